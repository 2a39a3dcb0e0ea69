"""Which ops act on each summand of a stream alone, and what they do to its channel axis.

A carrier is linear and touches one element at a time or only re-lays them out, so it can be applied to
every source of a read instead of to the running sum:

    (a + b).to(float32) * 0.5   ==   a.to(float32) * 0.5 + b.to(float32) * 0.5

Active dropout is not one: a copy would draw another mask. Neither is anything that mixes elements, nor a factor that is
computed from the sum itself: x / x.norm() is a norm, and so is one of a single token at a batch of one.
"""

import math
from typing import Any

import torch
from torch import fx

from attnres_rewrite.fxgraph import argument, has_one_element, is_floating, op_name, shape_of, tensor_of

VIEWS = frozenset(
    """view reshape _unsafe_view _reshape_alias view_as reshape_as flatten unflatten permute transpose movedim
    moveaxis swapaxes swapdims t mT unsqueeze squeeze""".split()
)
CASTS = frozenset("to _to_copy type_as clone contiguous alias lift_fresh_copy".split())
DROPOUTS = frozenset("dropout native_dropout alpha_dropout feature_dropout".split())


def carried_input(node: fx.Node) -> fx.Node | None:
    """Return the stream input of a carrier, or None when the node is not a carrier."""
    source = _linear_input(node)
    if source is None or op_name(node) not in ("mul", "div"):
        return source
    factor = argument(node, 1 if node.args[0] is source else 0, "other")
    return None if _is_made_of(factor, source) else source


def _linear_input(node: fx.Node) -> fx.Node | None:
    """Return the input that a node re-lays out, casts or multiplies, whatever the factor is made of."""
    first = argument(node, 0, "self") if node.op == "call_function" else None
    if first is None or not is_floating(node):
        return None
    name = op_name(node)
    if name in VIEWS or name in CASTS:
        # bits read as another dtype are no longer a sum
        return first if is_floating(first) and node.target is not torch.ops.aten.view.dtype else None
    if name in DROPOUTS:
        return first if _is_inactive(node) else None
    if name == "add":
        return first if is_floating(first) and _is_number(argument(node, 1, "other"), 0) else None
    if name in ("mul", "div"):
        return _scaled_input(node, name)
    return None


def _is_inactive(dropout: fx.Node) -> bool:
    return argument(dropout, 1, "p", 0.5) == 0 or argument(dropout, 2, "train", True) is False


def _is_number(value: object, wanted: float) -> bool:
    return isinstance(value, int | float) and value == wanted


def _scaled_input(node: fx.Node, name: str) -> fx.Node | None:
    """Return x of x * c, c * x and x / c, where c is a number, one element, or a channel vector."""
    first, second = argument(node, 0, "self"), argument(node, 1, "other")
    if node.kwargs.get("rounding_mode") is not None:
        return None
    if _scales(second, first) and shape_of(first) == shape_of(node):
        return first
    if name == "mul" and _scales(first, second) and shape_of(second) == shape_of(node):
        return second
    return None


def _is_made_of(factor: Any, stream: fx.Node) -> bool:
    """Say whether a factor depends on the value that `stream` carries."""
    root = stream
    # not stream_root, which would ask this of every factor on the way, and each of them of all before it
    while (source := _linear_input(root)) is not None:
        root = source
    todo, seen = [factor], {root}
    while todo:
        node = todo.pop()
        # what comes before the root cannot depend on it
        if not isinstance(node, fx.Node) or node < root:
            continue
        if node is root:
            return True
        todo += [source for source in node.all_input_nodes if source not in seen or source is root]
        seen.update(node.all_input_nodes)
    return False


def _scales(factor: Any, stream: Any) -> bool:
    if not is_floating(stream) or has_one_element(stream):
        return False
    if isinstance(factor, int | float) or has_one_element(factor):
        return True
    return is_channel_vector(factor, stream)


def is_channel_vector(factor: Any, stream: Any) -> bool:
    """Say whether `factor` is a parameter with one value for each element of the last axis of `stream`."""
    size, shape = shape_of(factor), shape_of(stream)
    if not size or not shape or len(size) > len(shape) or len(shape) < 2 or not is_floating(factor):
        return False
    return size[-1] == shape[-1] and all(dim == 1 for dim in size[:-1]) and is_parameter(factor)


def is_parameter(node: fx.Node) -> bool:
    """Say whether a node is a parameter or buffer or a part of one, possibly cast, viewed or expanded."""
    while node.op == "call_function" and op_name(node) in CASTS | VIEWS | _PARTS:
        if not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return node.op == "get_attr"


_PARTS = frozenset("expand expand_as select slice getitem unbind chunk split".split())


def stream_root(node: fx.Node) -> fx.Node:
    """Follow carriers up to the value that they carry."""
    while (source := carried_input(node)) is not None:
        node = source
    return node


def carriers_between(top: fx.Node, bottom: fx.Node) -> tuple[fx.Node, ...]:
    """Return the carriers from `top` (exclusive) down to `bottom`, in order."""
    path: list[fx.Node] = []
    node: fx.Node | None = bottom
    while node is not None and node is not top:
        path.append(node)
        node = carried_input(node)
    assert node is top, f"{bottom} is not carried from {top}"
    return tuple(reversed(path))


def carry_axis(carrier: fx.Node, axis: int) -> int | None:
    """Return where a carrier puts an axis of its input, counted from 0; None when it breaks it up."""
    before, after = shape_of(carried_input(carrier)), shape_of(carrier)
    assert before is not None
    assert after is not None
    name = op_name(carrier)
    if name not in VIEWS:
        return axis
    if name == "permute":
        return [dim % len(before) for dim in argument(carrier, 1, "dims")].index(axis)
    if name in ("transpose", "swapaxes", "swapdims", *_SWAPPED):
        pair = _SWAPPED.get(name) or (argument(carrier, 1, "dim0"), argument(carrier, 2, "dim1"))
        first, second = (dim % len(before) for dim in pair)
        return {first: second, second: first}.get(axis, axis)
    if name in ("movedim", "moveaxis"):
        return _moved_axis(carrier, axis, len(before))
    # row-major: the axis survives when it keeps its size and what lies behind it
    behind = math.prod(before[axis + 1 :])
    for place, size in enumerate(after):
        if size == before[axis] and math.prod(after[place + 1 :]) == behind:
            return place
    return None


_SWAPPED = {"t": (0, 1), "mT": (-2, -1)}


def _moved_axis(carrier: fx.Node, axis: int, rank: int) -> int:
    sources, targets = argument(carrier, 1, "source"), argument(carrier, 2, "destination")
    sources = [sources] if isinstance(sources, int) else sources
    targets = [targets] if isinstance(targets, int) else targets
    moves = {source % rank: target % rank for source, target in zip(sources, targets, strict=True)}
    if axis in moves:
        return moves[axis]
    kept = [dim for dim in range(rank) if dim not in moves]
    free = [dim for dim in range(rank) if dim not in moves.values()]
    return free[kept.index(axis)]


def restored_axis(path: tuple[fx.Node, ...], axis: int) -> int | None:
    """Return the axis at the top of a path of carriers that ends up as `axis` at its bottom."""
    if not path:
        return axis
    top = tensor_of(carried_input(path[0]))
    assert top is not None
    for candidate in range(top.dim()):
        place: int | None = candidate
        for carrier in path:
            place = None if place is None else carry_axis(carrier, place)
        if place == axis:
            return candidate
    return None
