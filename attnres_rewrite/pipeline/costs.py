"""What a node of a graph costs, for balance: its floating-point operations, and the bytes it moves.

    seconds = max(FLOPs / flops_per_s, bytes / bytes_per_s)        the roofline of one device

Counted for the forward; a backward costs about twice that, in every stage alike. Bytes are what the node reads and
writes by itself, so they overstate what a compiler fuses: element-wise chains count as nothing but their last result.
"""

import math
from dataclasses import dataclass

import torch
from torch import fx

from attnres_rewrite.fxgraph import argument, num_bytes_of, op_name, shape_of


@dataclass(frozen=True, slots=True)
class Device:
    """The speeds that weigh operations against bytes: of an H100 in bfloat16, as far as a network reaches them."""

    flops_per_s: float = 400e12
    bytes_per_s: float = 2.4e12


def seconds_of(node: fx.Node, device: Device) -> float:
    """Estimate one node, forward."""
    return max(flops_of(node) / device.flops_per_s, _moved_bytes(node) / device.bytes_per_s)


def seconds_of_many_tokens(node: fx.Node, device: Device) -> float:
    """Estimate one node, forward, without reading its parameters: what a step of many tokens costs, for those here."""
    moved = _moved_bytes(node)
    if moved and flops_of(node):
        moved -= sum(num_bytes_of(entry) for entry in node.all_input_nodes if entry.op == "get_attr")
    return max(flops_of(node) / device.flops_per_s, moved / device.bytes_per_s)


def flops_of(node: fx.Node) -> int:
    """Count the operations of a matrix product, a convolution or an attention; everything else counts as none.

    A multiplication and an addition are two. Attention is counted in full, causal or not.
    """
    out = shape_of(node)
    if node.op != "call_function" or out is None:
        return 0
    name = op_name(node)
    if name in ("linear", "matmul", "mm", "bmm", "_grouped_mm"):
        return 2 * math.prod(out) * _size(node, 0, "self", -1)
    if name in ("addmm", "baddbmm"):
        return 2 * math.prod(out) * _size(node, 1, "mat1", -1)
    if name == "einsum":
        return _einsum_flops(node)
    if name.startswith("conv"):
        weight = shape_of(argument(node, 1, "weight")) or (1, 1)
        # each weight meets every place of the input in a transposed one, of the output in the others
        places = shape_of(argument(node, 0, "input")) or out if "transpose" in name else out
        return 2 * math.prod(places) * math.prod(weight[1:])
    if name == "scaled_dot_product_attention":
        queries, keys = math.prod(out[:-1]), _size(node, 1, "key", -2)
        return 2 * queries * keys * (_size(node, 0, "query", -1) + _size(node, 2, "value", -1))
    return 0


def _einsum_flops(node: fx.Node) -> int:
    """Count one product of all operands: every size that a letter stands for, once."""
    equation, operands = str(node.args[0]).replace(" ", ""), argument(node, 1, "tensors")
    sizes: dict[str, int] = {}
    around: tuple[int, ...] = ()
    for term, operand in zip(equation.partition("->")[0].split(","), operands, strict=True):
        shape = shape_of(operand) or ()
        before, dots, after = term.partition("...")
        sizes |= dict(zip(before, shape, strict=False))
        sizes |= dict(zip(reversed(after), reversed(shape), strict=False))
        if dots:
            around = max(around, shape[len(before) : len(shape) - len(after)], key=math.prod)
    return 2 * math.prod(sizes.values()) * math.prod(around) if len(operands) > 1 else 0


def _size(node: fx.Node, position: int, name: str, dim: int) -> int:
    shape = shape_of(argument(node, position, name)) or (0, 0)
    return int(shape[dim])


def _moved_bytes(node: fx.Node) -> int:
    if node.op != "call_function" or (isinstance(node.target, torch._ops.OpOverload) and node.target.is_view):
        return 0
    if flops_of(node) or op_name(node) in ("block_attn_res", "variant_attn_res"):
        return num_bytes_of(node) + sum(num_bytes_of(entry) for entry in node.all_input_nodes)
    return num_bytes_of(node)
