"""Say of every add that is not an update why it was left alone."""

from collections import Counter
from collections.abc import Sequence

from torch import fx

from attnres_rewrite.fxgraph import is_floating, op_name, owner_of, shape_of, source_line, tensor_of
from attnres_rewrite.passes.carriers import is_parameter
from attnres_rewrite.passes.reachability import Operands, Reachability
from attnres_rewrite.records import LeftAlone


def left_alone(reach: Reachability, on_stream: set[fx.Node], dropped: dict[fx.Node, str]) -> tuple[LeftAlone, ...]:
    """Return every add of tensors that is not in `on_stream`, with its reason, in graph order."""
    return tuple(
        LeftAlone(node.name, source_line(node), owner_of(node), dropped.get(node) or _reason(node, reach))
        for node in reach.nodes
        if op_name(node) in ("add", "add_") and tensor_of(node) is not None and node not in on_stream
    )


def summary(reasons: Sequence[LeftAlone]) -> str:
    """Count the reasons, most frequent first, one line each."""
    counts = Counter(entry.reason for entry in reasons)
    return "\n  ".join(f"{count} x {reason}" for reason, count in counts.most_common()) or "The graph has no add."


def _reason(node: fx.Node, reach: Reachability) -> str:
    if not is_floating(node):
        return "adds integers: positions, sizes or masks"
    if op_name(node) == "add_":
        return "writes in place into memory that is read under another name later"
    operands = reach.operands.get(node)
    if operands is None:
        return _reason_without_operands(node)
    if any(is_parameter(arg) for arg in (operands.left, operands.right)):
        return "adds a parameter: a bias or a position embedding"
    if shape_of(operands.left) != shape_of(operands.right):
        return "broadcasts one operand, and the other is not on a stream"
    return _reason_of_operands(operands, reach)


def _reason_without_operands(node: fx.Node) -> str:
    if len(node.all_input_nodes) < 2:
        return "adds a number: an offset or the eps of a norm"
    if len(shape_of(node) or ()) < 2:
        return "adds vectors or scalars, not tokens of a stream"
    return "adds tensors of another kind than floating point"


def _reason_of_operands(operands: Operands, reach: Reachability) -> str:
    left, right = operands.left_root, operands.right_root
    if left is right:
        return "adds a value to itself"
    for root, branch in ((left, operands.right), (right, operands.left)):
        if reach.reaches(root, branch):
            return "is element-wise: x + g(x) without a layer between, an activation's inner sum"
    return "adds two values that do not read each other: rotary halves, gates, experts or embeddings"
