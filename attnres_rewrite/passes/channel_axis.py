"""Find the axis of a stream that holds its channels, from what its readers do.

A norm names the axis: layer_norm and rms_norm by their shape, a hand-written one by the dimension of its
mean, group and batch norms by convention (axis 1). Where no norm reads the stream, a linear layer
(last axis) or a convolution (axis 1) does. The layers that make the root and the updates have to agree. Readers
that disagree, or that say nothing, make a refusal: mixing along another axis would be a wrong graph that no proof
at zero queries can see. A mean over tokens that only gates or pools is no norm.
"""

import math
from collections.abc import Iterator, Sequence

from torch import fx

from attnres_rewrite.fxgraph import argument, op_name, shape_of, symbolic_shape_of, tensor_of
from attnres_rewrite.passes.carriers import (
    CASTS,
    DROPOUTS,
    carried_input,
    carriers_between,
    carry_axis,
    restored_axis,
    stream_root,
)

_LAST_AXIS_NORMS = frozenset("layer_norm rms_norm native_layer_norm _fused_rms_norm".split())
_FIRST_AXIS_NORMS = frozenset("batch_norm group_norm instance_norm native_group_norm".split())
_REDUCTIONS = frozenset("mean var std var_mean linalg_vector_norm norm sum".split())
_ELEMENTWISE = CASTS | DROPOUTS | frozenset("pow square mul abs sub div neg relu gelu silu tanh sigmoid".split())
_CONVOLUTIONS = frozenset("conv1d conv2d conv3d convolution".split())
_STEPS = 4  # element-wise ops followed from the stream to the reduction of a hand-written norm


def channel_axes(
    states: Sequence[fx.Node], moves: Sequence[tuple[fx.Node, ...]], branches: Sequence[fx.Node]
) -> tuple[int, ...] | str:
    """Return the channel axis of every state, agreed on by the consumers of all of them, or why there is none.

    Args:
        states: The root and the states after it.
        moves: The carriers between one state and the next.
        branches: What is added to each state but the last.
    """
    root = tensor_of(states[0])
    assert root is not None
    # for each state, where every axis of the root is found in it
    places: list[dict[int, int]] = [{axis: axis for axis in range(root.dim())}]
    for path in moves:
        places.append(_moved(places[-1], path))
    norms: set[int] = set()
    layers: set[int] = set()
    for state, place in zip(states, places, strict=True):
        axis_at_root = {there: axis for axis, there in place.items()}
        for votes, into in zip(axis_votes(state), (norms, layers), strict=True):
            into |= {axis_at_root[axis] for axis in votes if axis in axis_at_root}
    agreed = norms or layers
    if len(agreed) != 1:
        seen = f"axes {sorted(agreed)}" if agreed else "no axis"
        return f"its channel axis cannot be told: its readers name {seen}, and a wrong one would be a wrong network"
    made = set(_axes_made(states, places, branches))
    if (norms and (others := layers | made) and not norms & others) or (not norms and made - layers):
        return (
            f"its channel axis cannot be told: its readers name axis {min(agreed)}, the layers around it axes "
            f"{sorted(layers | made)}, and a wrong one would be a wrong network"
        )
    axis = agreed.pop()
    if any(axis not in place for place in places):
        return "its channels are split or merged between updates"
    axes = tuple(place[axis] for place in places)
    widths = {(symbolic_shape_of(state) or ())[there] for state, there in zip(states, axes, strict=True)}
    if len(widths) != 1 or not isinstance(next(iter(widths)), int):
        return f"its width is not one fixed size: {', '.join(sorted(map(str, widths)))}"
    return axes


def _moved(places: dict[int, int], path: tuple[fx.Node, ...]) -> dict[int, int]:
    for carrier in path:
        moved = {axis: carry_axis(carrier, there) for axis, there in places.items()}
        places = {axis: there for axis, there in moved.items() if there is not None}
    return places


def _axes_made(
    states: Sequence[fx.Node], places: Sequence[dict[int, int]], branches: Sequence[fx.Node]
) -> Iterator[int]:
    """Yield the axes, counted at the root, that hold the outputs of the layers that made the root and the updates."""
    for value, state, place in zip((states[0], *branches), states, places, strict=True):
        made_by = stream_root(value)
        axis = _output_axis(made_by)
        for carrier in carriers_between(made_by, value):
            axis = None if axis is None else carry_axis(carrier, axis)
        if axis is not None:
            # an update may lack leading axes
            axis += _rank(state) - _rank(value)
            yield from (at_root for at_root, there in place.items() if there == axis)


def _output_axis(layer: fx.Node) -> int | None:
    if op_name(layer) in ("linear", "embedding"):
        return _rank(layer) - 1
    return 1 if op_name(layer) in _CONVOLUTIONS else None


def axis_votes(state: fx.Node) -> tuple[set[int], set[int]]:
    """Return the axes of a state that norms among its consumers name, and those that layers name."""
    norms: set[int] = set()
    layers: set[int] = set()
    todo: list[tuple[fx.Node, tuple[fx.Node, ...], int]] = [(state, (), 0)]
    while todo:
        value, path, steps = todo.pop()
        for user in value.users:
            for axis, is_norm in _axes_used(user, value):
                place = restored_axis(path, axis)
                if place is not None:
                    (norms if is_norm else layers).add(place)
            if carried_input(user) is value:
                todo.append((user, (*path, user), steps))
            elif op_name(user) in _ELEMENTWISE and steps < _STEPS and _rank(user) == _rank(value):
                todo.append((user, path, steps + 1))
    return norms, layers


def _axes_used(user: fx.Node, value: fx.Node) -> Iterator[tuple[int, bool]]:
    """Yield the axis that `user` treats as the channels of `value`, and whether as a norm does."""
    name, rank = op_name(user), _rank(value)
    if not user.args or user.args[0] is not value:
        return
    if name in _LAST_AXIS_NORMS and len(argument(user, 1, "normalized_shape")) == 1:
        yield rank - 1, True
    elif name in _FIRST_AXIS_NORMS:
        yield 1, True
    elif name in _REDUCTIONS and argument(user, *_KEEPDIM.get(name, (2, "keepdim"))) is True:
        # without keepdim it is a pooling, not half of a norm
        if not _scales_back(user):
            return
        dims = argument(user, *_DIM.get(name, (1, "dim")))
        if isinstance(dims, int) or (dims is not None and len(dims) == 1):
            yield (dims if isinstance(dims, int) else dims[0]) % rank, True
    elif name == "linear":
        yield rank - 1, False
    elif name in _CONVOLUTIONS:
        yield 1, False


def _scales_back(statistic: fx.Node) -> bool:
    """Say whether what is made of a mean, a variance or a length divides something again, as in a norm."""
    # var_mean gives two of one size
    size = _numel(statistic) or max(map(_numel, statistic.users), default=0)
    todo = [(statistic, False)]
    while todo:
        value, inverse = todo.pop()
        for user in value.users:
            name, wider = op_name(user), _numel(user) > size
            divides = name == "div" and argument(user, 1, "other") is value
            if wider and (divides or (name == "mul" and inverse)):
                return True
            if name in _OF_A_STATISTIC or (name in ("add", "sub", "mul", "div") and not wider):
                todo.append((user, inverse or name in _INVERSES))
    return False


_INVERSES = frozenset("rsqrt reciprocal pow".split())
_OF_A_STATISTIC = CASTS | _INVERSES | frozenset("sqrt clamp clamp_min expand expand_as getitem neg square".split())


def _numel(node: fx.Node) -> int:
    return math.prod(shape_of(node) or (0,))


_DIM = {"linalg_vector_norm": (2, "dim"), "norm": (2, "dim")}
_KEEPDIM = {
    "linalg_vector_norm": (3, "keepdim"),
    "norm": (3, "keepdim"),
    "var": (3, "keepdim"),
    "std": (3, "keepdim"),
}


def _rank(node: fx.Node) -> int:
    value = tensor_of(node)
    return -1 if value is None else value.dim()
