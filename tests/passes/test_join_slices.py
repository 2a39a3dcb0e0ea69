"""Mirrors attnres_rewrite/passes/join_slices.py: what was cut and put together again."""

import pytest
import torch
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.capture import capture
from attnres_rewrite.fxgraph import op_name
from attnres_rewrite.passes.join_slices import join_slices
from tests.networks import WIDTH, Layer


class Calls(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def joined(function, x, dynamic_shapes=None):
    """Return the names of the calls that are left, and check that their result is the same."""
    model = Calls(function)
    gm = capture(model, (x,), both_modes=False, dynamic_shapes=dynamic_shapes).programs[True]
    join_slices(gm.graph)
    gm.graph.lint()
    gm.recompile()
    found, wanted = gm(x), model(x)
    assert torch.equal(found[0] if isinstance(found, tuple) else found, wanted)
    calls = [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]
    return [name for name in calls if name not in ("check_inputs", "sym_size", "sub")]


def written(x):
    x[:, :2].mul_(2)
    return torch.cat([x[:, :2], x[:, 2:]], 1)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: torch.cat([x[:, :2], x[:, 2:]], 1), id="two slices"),
        pytest.param(lambda x: torch.cat([x[:, :-2], x[:, -2:]], -2), id="counted from the end"),
        pytest.param(lambda x: torch.cat([x[:, : x.shape[1] - 1], x[:, x.shape[1] - 1 :]], 1), id="a size"),
        pytest.param(lambda x: torch.cat(x.split([1, 4], 1), 1), id="split"),
        pytest.param(lambda x: torch.cat(x.chunk(3, 1), 1), id="chunk"),
    ],
)
def test_all_parts_in_their_order_are_the_whole(function):
    assert joined(function, torch.randn(2, 5, WIDTH)) == ["linear", "clone"]


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: torch.cat([x[:, 2:], x[:, :2]], 1), id="the other order"),
        pytest.param(lambda x: torch.cat([x[:, :2], x[:, 3:]], 1), id="a gap"),
        pytest.param(lambda x: torch.cat([x[:, :3], x[:, 2:]], 1), id="an overlap"),
        pytest.param(lambda x: torch.cat([x[:, :2:2], x[:, 2:]], 1), id="steps"),
        pytest.param(lambda x: torch.cat([x[:, 1:2], x[:, 2:]], 1), id="a part is missing"),
        pytest.param(lambda x: torch.cat([x[:, :2], x[:, 2:-1]], 1), id="the end is missing"),
        pytest.param(lambda x: torch.cat([x[:, :2], x[:, 2:].mul(2)], 1), id="something between"),
        pytest.param(lambda x: torch.cat([x[:, :4], x[:, 4:]], 2) if x.shape[1] == 8 else x, id="another axis"),
        pytest.param(lambda x: torch.cat(x.split([1, 7], 1)[::-1], 1), id="pieces in another order"),
        pytest.param(lambda x: torch.cat(x.chunk(4, 1)[:3], 1), id="a piece is missing"),
        pytest.param(lambda x: torch.cat([x[:, :2], (x + 1)[:, 2:]], 1), id="of two tensors"),
    ],
)
def test_anything_else_is_left_alone(function):
    assert "cat" in joined(function, torch.randn(2, 8, WIDTH))


def test_what_is_written_into_a_part_is_in_the_whole():
    assert "clone" in joined(written, torch.randn(2, 5, WIDTH))


class InTwo(nn.Module):
    """Layers hand the first three tokens and the rest to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(lambda s, x: x + s.f(s.n1(x))) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        text, image = x[:, :3], x[:, 3:]
        for layer in self.layers:
            x = layer(torch.cat([text, image], 1))
            text, image = x[:, :3], x[:, 3:]
        return self.norm(image)


def test_a_stream_goes_on_behind_it():
    torch.manual_seed(0)
    new = ar.rewrite(InTwo(), (torch.randn(2, 7, WIDTH),), config=ar.AttnResConfig(block_size=2))
    assert [stream.num_updates for stream in new.report.streams] == [4]
