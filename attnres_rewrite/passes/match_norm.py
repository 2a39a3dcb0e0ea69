"""Recognise the norm that reads a value: torch's own, or an RMSNorm written out by hand.

    y = rms_norm(h, [D], w, eps);  y = layer_norm(h, [D], w, b, eps)
    x = h.float();  y = w * (x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)       transformers
    x = h.float();  y = (x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + w.float())).type_as(h)

The cast back may stand before or after the weight, and there may be no weight. Not recognised: a norm of a part of the
channels, of another axis, with an eps that is a tensor, or whose result has another dtype than what it reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from attnres_rewrite.fxgraph import argument, op_name, shape_of, tensor_of


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over the channels of one value: `end` is its result. `eps` None is torch's own default for the dtype."""

    kind: Literal["rms", "layer"]
    end: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float | None


def match_norm(value: fx.Node) -> Norm | str:
    """Return the norm that is the only reader of `value` [..., D], or the reason why there is none."""
    readers = readers_of(value)
    if len(readers) == 1 and op_name(readers[0]) in ("layer_norm", "rms_norm"):
        found = _own_norm(value, readers[0])
    else:
        found = _written_out(value, readers)
    if isinstance(found, str):
        return found
    if any(node is not None and not is_of_parameters(node) for node in (found.weight, found.bias)):
        return "its weight or bias is worked out from activations"
    before, after = tensor_of(value), tensor_of(found.end)
    if before is None or after is None or (before.dtype, before.shape) != (after.dtype, after.shape):
        return "the norm returns another dtype than it reads"
    return found


def readers_of(node: fx.Node) -> list[fx.Node]:
    """Return the users of a node that compute something."""
    return [user for user in node.users if op_name(user) != "_assert_tensor_metadata"]


def _own_norm(value: fx.Node, norm: fx.Node) -> Norm | str:
    if norm.args[0] is not value or list(argument(norm, 1, "normalized_shape")) != list(shape_of(value) or ())[-1:]:
        return "the norm is not over the channels alone"
    weight, bias = argument(norm, 2, "weight"), None
    if op_name(norm) == "layer_norm":
        bias = argument(norm, 3, "bias")
        eps = argument(norm, 4, "eps", 1e-5)
        return Norm("layer", norm, weight, bias, eps)
    return Norm("rms", norm, weight, None, argument(norm, 3, "eps"))


def _written_out(value: fx.Node, readers: Sequence[fx.Node]) -> Norm | str:
    used = [reader for reader in readers if not _asks_for_dtype(reader, value)]
    wide = used[0] if len(used) == 1 and _is_cast(used[0], value) else value
    if not _is_as_precise(wide, value):
        return "the norm works in a lower precision than it reads"
    inside = [reader for reader in readers_of(wide) if not _asks_for_dtype(reader, wide)]
    squares = [reader for reader in inside if _is_square(reader, wide)]
    if len(squares) != 1:
        return _why_no_norm(used)
    mean = _only_reader(squares[0], "mean")
    shifted = _only_reader(mean, "add")
    rstd = _only_reader(shifted, "rsqrt")
    scaled = _only_reader(rstd, "mul")
    if mean is None or shifted is None or rstd is None or scaled is None or set(inside) != {squares[0], scaled}:
        return _why_no_norm(used)
    eps = shifted.args[1]
    if (
        not isinstance(eps, float)
        or shifted.kwargs
        or not _over_channels(mean, wide)
        or set(scaled.all_input_nodes) != {wide, rstd}
    ):
        return _why_no_norm(used)
    tail, weight = _tail(scaled, value, wide)
    if not {*readers_of(value), *readers_of(wide)} <= {wide, squares[0], scaled, *tail}:
        return "its dtype is asked for outside the norm"
    return Norm("rms", tail[-1] if tail else scaled, weight, None, eps)


def _asks_for_dtype(node: fx.Node, value: fx.Node) -> bool:
    return op_name(node) == "type_as" and node.args[0] is not value


def _why_no_norm(readers: Sequence[fx.Node]) -> str:
    if len(readers) > 1:
        return f"{len(readers)} consumers read it, and not as one norm"
    return f"it is read by {op_name(readers[0]) or readers[0].op}, not by a norm" if readers else "nothing reads it"


def _is_cast(node: fx.Node, value: fx.Node) -> bool:
    return op_name(node) in ("to", "_to_copy", "type_as") and node.args[0] is value


def _is_square(node: fx.Node, value: fx.Node) -> bool:
    if op_name(node) == "pow":
        return node.args == (value, 2)
    return op_name(node) == "square" or (op_name(node) == "mul" and node.args == (value, value))


def _only_reader(node: fx.Node | None, name: str) -> fx.Node | None:
    readers = readers_of(node) if node is not None else []
    return readers[0] if len(readers) == 1 and op_name(readers[0]) == name else None


def _over_channels(mean: fx.Node, value: fx.Node) -> bool:
    last = len(shape_of(value) or ()) - 1
    dims = argument(mean, 1, "dim")
    return argument(mean, 2, "keepdim", False) is True and list(dims or ()) in ([-1], [last])


def _tail(scaled: fx.Node, value: fx.Node, wide: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """Follow the casts and the weight after the scaling, as far as the dtype of `value` lasts.

    Returns:
        The nodes after the scaling, in order, and the weight if it is among their factors.
    """
    tail: list[fx.Node] = []
    factors: list[fx.Node | None] = []
    end = scaled
    while len(readers := readers_of(end)) == 1:
        after = readers[0]
        factor = None
        if not (_is_cast(after, end) and set(after.all_input_nodes) <= {end, value, wide}):
            factor = _weight_factor(after, end)
            if factor is None or any(factors):
                break
        end = after
        tail.append(end)
        factors.append(factor)
    while tail and not _same_dtype(tail[-1], value):
        del tail[-1], factors[-1]
    return tail, next((factor for factor in factors if factor is not None), None)


def _is_as_precise(one: fx.Node, other: fx.Node) -> bool:
    left, right = tensor_of(one), tensor_of(other)
    return left is not None and right is not None and torch.promote_types(left.dtype, right.dtype) == left.dtype


def _same_dtype(one: fx.Node, other: fx.Node) -> bool:
    left, right = tensor_of(one), tensor_of(other)
    return left is not None and right is not None and left.dtype == right.dtype


def _weight_factor(product: fx.Node, value: fx.Node) -> fx.Node | None:
    """Return the other factor of a product, if it is a vector [D] made of parameters alone."""
    if op_name(product) != "mul" or len(product.args) != 2 or value not in product.args:
        return None
    other = product.args[1] if product.args[0] is value else product.args[0]
    width = (shape_of(value) or (None,))[-1]
    if isinstance(other, fx.Node) and tuple(shape_of(other) or ()) == (width,) and is_of_parameters(other):
        return other
    return None


def is_of_parameters(node: fx.Node) -> bool:
    """Say whether a value is worked out from parameters and buffers alone, by ops without effects."""
    if node.op == "get_attr":
        return True
    pure = op_name(node) in ("to", "_to_copy", "add", "mul") and isinstance(node.target, torch._ops.OpOverload)
    return pure and bool(node.all_input_nodes) and all(map(is_of_parameters, node.all_input_nodes))
