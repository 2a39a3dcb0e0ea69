"""Mirrors attnres_rewrite/passes/post_norm.py: what stands between two chains and makes them no streams."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnres_rewrite.errors import NoStreamError, PostNormError
from tests.networks import Layer, gpt, gpt_of
from tests.passes.test_find_stream import search


def layer(s: Layer, x: Tensor) -> Tensor:
    x = x + s.f(s.n1(x))
    return x + s.g(s.n2(x))


def mask(x: Tensor) -> Tensor:
    return (torch.arange(x.shape[1]) < 4)[:, None]


def last_written(s: Layer, x: Tensor) -> Tensor:
    y = layer(s, x).clone()
    y[:, -1:] = s.f(s.n1(y[:, -1:]))
    return y


BETWEEN = {
    "mul": lambda s, x: layer(s, x) * mask(x),
    "masked_fill": lambda s, x: layer(s, x).masked_fill(~mask(x), 0.0),
    "where": lambda s, x: torch.where(mask(x), layer(s, x), x),
    "detach": lambda s, x: layer(s, x).detach(),
    "clamp": lambda s, x: layer(s, x).clamp(-9, 9),
    "neg": lambda s, x: -layer(s, x),
    "roll": lambda s, x: layer(s, x).roll(1, 1),
    "add": lambda s, x: (y := layer(s, x)) + s.f(s.n1(y).mean(1, keepdim=True)),
    "lerp": lambda s, x: torch.lerp(y := layer(s, x), s.f(s.n1(y)), 0.3),
    "baddbmm": lambda s, x: torch.baddbmm(y := layer(s, x), y @ y.mT, s.n1(y)),
    "index_add": lambda s, x: (y := layer(s, x)).index_add(1, torch.arange(2), s.f(s.n1(y[:, :2]))),
    "scatter": lambda s, x: (y := layer(s, x)).scatter(1, y[:, :2].long() * 0, s.f(s.n1(y[:, :2]))),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_layers_that_are_joined_by_more_than_an_add_are_not_a_stream_each(name):
    with pytest.raises(NoStreamError, match=f"6 x the sum passes through {name} before the next update"):
        search(gpt_of(BETWEEN[name], depth=3))


class Joined(nn.Module):
    """Two stacks of two layers, with something done to the sum between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.front, self.back, self.between = gpt(2), gpt(2), between

    def forward(self, ids: Tensor) -> Tensor:
        x = self.front.embed(ids)
        for each in self.front.layers:
            x = each(x)
        x = self.between(x)
        for each in self.back.layers:
            x = each(x)
        return self.back.head(self.back.norm(x))


def test_stacks_with_a_mask_between_them_are_a_stream_each():
    joined = Joined(lambda x: x * mask(x))
    assert [len(stream.updates) for stream in search(joined).streams] == [4, 4]


def test_an_update_that_is_not_understood_does_not_make_two_streams_of_one():
    with pytest.raises(NoStreamError, match="8 x the sum passes through add before the next update"):
        search(Joined(lambda x: x + torch.tanh(x)))


def conformer(s: Layer, x: Tensor) -> Tensor:
    x = x + 0.5 * s.f(s.n1(x))
    x = x + s.g(s.n1(x))
    x = x + s.f(s.n1(x))
    x = x + 0.5 * s.g(s.n1(x))
    return s.n2(x)


def test_a_norm_at_the_end_of_each_layer_is_post_norm_however_many_updates_a_layer_has():
    with pytest.raises(PostNormError, match="post-norm"):
        search(gpt_of(conformer, depth=3))


def test_an_activation_behind_a_norm_of_the_sum_is_post_norm():
    with pytest.raises(PostNormError, match="post-norm"):
        search(gpt_of(lambda s, x: torch.relu(s.n2(layer(s, x))), depth=3))
