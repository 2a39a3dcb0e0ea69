"""Which stream candidates reach a node, and how: three bit sets a node, one sweep over the graph.

A *mark* is a value that some add takes as an operand, looked at through carriers. For every node:

seen       the marks it depends on (itself included)
straight   the marks that reach it through carriers and adds only, so it is on their stream
mixed      the marks that reach it through at least one op that mixes elements, so it is f(mark)
"""

from dataclasses import dataclass

from torch import fx

from attnres_rewrite.fxgraph import is_floating, op_name, shape_of, value_inputs
from attnres_rewrite.passes.carriers import CASTS, DROPOUTS, VIEWS, carried_input, stream_root
from attnres_rewrite.passes.normalize_adds import ADD

# Element-wise ops and ops that only select or join: x + g(x) of these is an activation, not a layer.
_NOT_MIXING = (
    CASTS
    | VIEWS
    | DROPOUTS
    | frozenset(
        """add sub mul div pow square neg abs tanh sigmoid exp log gelu silu relu erf sqrt rsqrt reciprocal clamp
        clamp_min clamp_max where masked_fill softplus hardtanh cos sin leaky_relu sign minimum maximum getitem slice
        select cat stack expand zeros_like ones_like index split chunk unbind split_with_sizes detach
        _assert_tensor_metadata""".split()
    )
)


@dataclass(frozen=True, slots=True)
class Operands:
    """The two operands of an add of tensors, and their roots through carriers."""

    left: fx.Node
    right: fx.Node
    left_root: fx.Node
    right_root: fx.Node


def operands_of(node: fx.Node) -> Operands | None:
    """Return the operands of an add of two floating tensors of rank 2 or more, or None."""
    if node.target is not ADD or not is_floating(node) or len(shape_of(node) or ()) < 2:
        return None
    left, right = node.args[:2]
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node) and is_floating(left) and is_floating(right)):
        return None
    return Operands(left, right, stream_root(left), stream_root(right))


def full_shape_operands(node: fx.Node, operands: Operands) -> list[fx.Node]:
    """Return the operands that are not broadcast."""
    return [arg for arg in (operands.left, operands.right) if shape_of(arg) == shape_of(node)]


class Reachability:
    """The bit sets of one graph, and the questions that find_stream asks of them."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.operands = {node: found for node in self.nodes if (found := operands_of(node))}
        self.bit: dict[fx.Node, int] = {}
        for node, found in self.operands.items():
            for mark in (node, found.left_root, found.right_root):
                self.bit.setdefault(mark, 1 << len(self.bit))
        self.seen: dict[fx.Node, int] = {}
        self.straight: dict[fx.Node, int] = {}
        self.mixed: dict[fx.Node, int] = {}
        for node in self.nodes:
            self._sweep(node)

    def _sweep(self, node: fx.Node) -> None:
        own = self.bit.get(node, 0)
        inputs = value_inputs(node)
        seen = mixed = 0
        for source in inputs:
            seen |= self.seen[source]
            mixed |= self.mixed[source]
        if node.op == "call_function" and op_name(node) not in _NOT_MIXING:
            mixed |= seen
        straight = 0
        for source in self._straight_inputs(node):
            straight |= self.straight[source]
        self.seen[node], self.mixed[node], self.straight[node] = seen | own, mixed, straight | own

    def _straight_inputs(self, node: fx.Node) -> list[fx.Node]:
        if (source := carried_input(node)) is not None:
            return [source]
        operands = self.operands.get(node)
        return full_shape_operands(node, operands) if operands else []

    def reaches(self, mark: fx.Node, node: fx.Node) -> bool:
        """Say whether `node` depends on `mark`, another node."""
        return node is not mark and bool(self.seen[node] & self.bit.get(mark, 0))

    def reaches_straight(self, mark: fx.Node, node: fx.Node) -> bool:
        """Say whether `node` is `mark` plus something, through carriers and adds only."""
        return node is not mark and bool(self.straight[node] & self.bit.get(mark, 0))

    def reaches_mixed(self, mark: fx.Node, node: fx.Node) -> bool:
        """Say whether some path from `mark` to `node` mixes elements."""
        return bool(self.mixed[node] & self.bit.get(mark, 0))
