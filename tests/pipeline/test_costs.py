"""Operations that a node counts as."""

import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

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


# Once the transposed one counted each weight for every place of the output
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_a_convolution(kind):
    layer, value = kind(D, E, kernel_size=3, stride=2), torch.randn(B, D, T)
    graph = torch.export.export(layer, (value,)).graph
    with FlopCounterMode(display=False) as counter:
        layer(value)
    assert sum(map(flops_of, graph.nodes)) == counter.get_total_flops() > 0
