"""Take for one value what was cut in two and put together again, so that a stream goes on behind it.

    text, image = x[:, :n], x[:, n:];  x = cat([text, image], 1)     ->   x = clone(x)
    parts = x.split(sizes, 1);         x = cat(parts, 1)             ->   x = clone(x)

Layers of diffusion transformers hand the tokens of text and image to each other in this way. A clone is a copy that is
contiguous, as the result of cat is, so every value stays, and so does what shares memory with what.

Does not handle: more than two slices, and parts in another order or with something between them.
"""

import operator
import sys
from collections.abc import Sequence

import torch
from torch import fx

from attnres_rewrite.fxgraph import argument, op_name, shape_of

_SPLITS = frozenset("split split_with_sizes chunk tensor_split".split())
Part = tuple[fx.Node, int]  # of which tensor, along which axis


def join_slices(graph: fx.Graph) -> None:
    """Replace every cat of all parts of one tensor by a clone; code is not generated anew."""
    for cat in list(graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)):
        parts = argument(cat, 0, "tensors")
        whole = _halves(parts) or _pieces(parts)
        if whole is None:
            continue
        source, axis = whole
        if argument(cat, 1, "dim", 0) % len(shape_of(source) or ()) == axis:
            cat.target, cat.args = torch.ops.aten.clone.default, (source,)
            cat.kwargs = {"memory_format": torch.contiguous_format}
            _erase_unused(graph, parts)


def _halves(parts: Sequence[fx.Node]) -> Part | None:
    """Return the x and the axis of [x[:n], x[n:]]: together they are x, whatever n is."""
    if len(parts) != 2 or any(op_name(part) != "slice" for part in parts):
        return None
    (left, axis, first, middle), (right, other_axis, again, last) = map(_slice, parts)
    if left is not right or axis != other_axis or middle is None or middle != again:
        return None
    return (left, axis) if first in (None, 0) and last in (None, sys.maxsize) else None


def _slice(node: fx.Node) -> tuple[fx.Node, int, object, object]:
    """Return what a slice is of, its axis, start and end; one with steps ends nowhere."""
    source = argument(node, 0, "self")
    axis = argument(node, 1, "dim", 0) % len(shape_of(source) or ())
    start, end = argument(node, 2, "start"), argument(node, 3, "end")
    if argument(node, 4, "step", 1) != 1:
        return source, axis, node, node
    while op_name(source) == "slice" and _is_whole(source):
        source = argument(source, 0, "self")
    return source, axis, start, end


def _is_whole(node: fx.Node) -> bool:
    start, end, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    return start in (None, 0) and end in (None, sys.maxsize) and step == 1


def _pieces(parts: Sequence[fx.Node]) -> Part | None:
    """Return the x and the axis of all pieces of one split, in their order."""
    split = parts[0].args[0] if parts[0].target is operator.getitem else None
    if not isinstance(split, fx.Node) or op_name(split) not in _SPLITS:
        return None
    pieces = [(split, index) for index in range(len(split.meta["val"]))]
    if [part.args for part in parts] != pieces or any(part.target is not operator.getitem for part in parts):
        return None
    source = argument(split, 0, "self")
    return source, argument(split, 2, "dim", 0) % len(shape_of(source) or ())


def _erase_unused(graph: fx.Graph, parts: Sequence[fx.Node]) -> None:
    for part in dict.fromkeys(parts):
        whole = part.args[0]
        for node in (part, whole):
            if isinstance(node, fx.Node) and not node.users and op_name(node) in _SPLITS | {"slice", "getitem"}:
                graph.erase_node(node)
