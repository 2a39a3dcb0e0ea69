"""Spell every tensor addition one way, so that find_stream has one case to match.

x += f, x.add_(f)          ->  add(x, f)             likewise mul_, div_, sub_
torch.add(x, f, alpha=c)   ->  add(x, mul(f, c))
x - f                      ->  add(x, neg(f))        tensors of one shape only
torch.addcmul(x, a, b)     ->  add(x, mul(a, b))

An in-place op is kept where its write can be seen elsewhere: by the caller, or through another name
of the same memory that is used later. Values do not change; names of kept nodes do not change.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnres_rewrite.fxgraph import (
    aliased_inputs,
    argument,
    is_floating,
    shape_of,
    tensor_of,
    written_inputs,
)

ADD = torch.ops.aten.add.Tensor
_OUT_OF_PLACE = {
    torch.ops.aten.add_.Tensor: ADD,
    torch.ops.aten.sub_.Tensor: torch.ops.aten.sub.Tensor,
    torch.ops.aten.mul_.Tensor: torch.ops.aten.mul.Tensor,
    torch.ops.aten.div_.Tensor: torch.ops.aten.div.Tensor,
    torch.ops.aten.mul_.Scalar: torch.ops.aten.mul.Scalar,
    torch.ops.aten.div_.Scalar: torch.ops.aten.div.Scalar,
}


def normalize_adds(gm: fx.GraphModule) -> dict[str, str]:
    """Rewrite the additions in the graph of `gm`; its code is not generated anew.

    Returns:
        For each in-place op that had to stay, by node name, the reason.
    """
    refused: dict[str, str] = {}
    memory = SharedMemory(list(gm.graph.nodes))
    for node in list(gm.graph.nodes):
        if node.target in _OUT_OF_PLACE and is_floating(node):
            if reason := why_not_out_of_place(node, memory):
                refused[node.name] = reason
            else:
                node.target = _OUT_OF_PLACE[node.target]
        if node.target is ADD or node.target is torch.ops.aten.sub.Tensor:
            _spell_out_factor(node)
        elif node.target is torch.ops.aten.addcmul.default:
            _spell_out_product(node)
    return refused


class SharedMemory:
    """Which nodes may share memory: the transitive closure of views and in-place results."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.position = {node: i for i, node in enumerate(nodes)}
        self.last_use = {node: max((self.position[user] for user in node.users), default=-1) for node in nodes}
        self.group_of: dict[fx.Node, list[fx.Node]] = {}
        for node in nodes:
            group = [node]
            for source in aliased_inputs(node):
                other = self.group_of[source]
                if other is not group:
                    small, group = sorted((group, other), key=len)
                    group.extend(small)
                    for member in small:
                        self.group_of[member] = group
            self.group_of[node] = group


def why_not_out_of_place(node: fx.Node, memory: SharedMemory) -> str | None:
    """Say why the write of an in-place op must stay, or return None when nobody else sees it."""
    (target,) = written_inputs(node)
    result, operand = tensor_of(node), tensor_of(target)
    if operand is None or result is None or shape_of(target) != shape_of(node):
        return "its shapes are unknown"
    if argument(node, 1, "other") is target:
        return "it writes into both operands"
    here = memory.position[node]
    for other in memory.group_of[target]:
        if other.op in ("placeholder", "get_attr"):
            return f"it writes into {other.target!r}, which the caller can see"
        if memory.position[other] < here < memory.last_use[other]:
            return f"it writes into memory that {other.name!r} names too, and that is read later"
    return None


def _spell_out_factor(node: fx.Node) -> None:
    """Turn alpha, or the minus sign of a subtraction, into an op on the second operand."""
    first, second = argument(node, 0, "input"), argument(node, 1, "other")
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node) and is_floating(node)):
        return
    alpha: Any = node.kwargs.get("alpha", 1)
    if node.target is not ADD:
        if shape_of(first) != shape_of(second):
            return
        alpha = -alpha
    if alpha == 1:
        return
    with node.graph.inserting_before(node):
        if alpha == -1:
            scaled = node.graph.call_function(torch.ops.aten.neg.default, (second,))
        else:
            scaled = node.graph.call_function(torch.ops.aten.mul.Tensor, (second, alpha))
    scaled.meta = dict(second.meta)
    node.target, node.args, node.kwargs = ADD, (first, scaled), {}


def _spell_out_product(node: fx.Node) -> None:
    """Turn addcmul(x, a, b, value) into add(x, a * b * value) when x has the full shape."""
    base, left, right = node.args[:3]
    if not isinstance(base, fx.Node) or shape_of(base) != shape_of(node) or not is_floating(node):
        return
    value = node.kwargs.get("value", 1)
    with node.graph.inserting_before(node):
        product = node.graph.call_function(torch.ops.aten.mul.Tensor, (left, right))
        product.meta = dict(node.meta)
        if value != 1:
            product = node.graph.call_function(torch.ops.aten.mul.Tensor, (product, value))
            product.meta = dict(node.meta)
    node.target, node.args, node.kwargs = ADD, (base, product), {}
