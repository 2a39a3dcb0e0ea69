"""Operations that a node counts as."""

import pytest
import torch
from torch import fx

from attnres_rewrite.pipeline.costs import flops_of

B, H, T, D, E = 2, 3, 5, 7, 11

# Once nothing: einsum stays what it is in a captured graph
EINSUMS = {
    "btd,de->bte": ((B, T, D), (D, E), 2 * B * T * D * E),
    "bhqd, bhkd -> bhqk": ((B, H, T, D), (B, H, E, D), 2 * B * H * T * E * D),
    "...d,de": ((B, T, D), (D, E), 2 * B * T * D * E),
    "b...d,d...->b": ((B, T, D), (D, T), 2 * B * T * D),
}


def einsum_node(equation: str, *shapes: tuple[int, ...]) -> fx.Node:
    graph = fx.Graph()
    operands = []
    for number, shape in enumerate(shapes):
        operands.append(graph.placeholder(f"x{number}"))
        operands[-1].meta["val"] = torch.empty(shape, device="meta")
    node = graph.call_function(torch.ops.aten.einsum.default, (equation, operands))
    node.meta["val"] = torch.einsum(equation, *(torch.empty(shape, device="meta") for shape in shapes))
    return node


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum(equation):
    one, other, wanted = EINSUMS[equation]
    assert flops_of(einsum_node(equation, one, other)) == wanted


def test_an_einsum_of_one_operand_multiplies_nothing():
    assert flops_of(einsum_node("btd->bdt", (B, T, D))) == 0
