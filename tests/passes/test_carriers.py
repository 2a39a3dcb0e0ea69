"""Mirrors attnres_rewrite/passes/carriers.py: what is applied to every source."""

import pytest
import torch
from torch import Tensor, nn

import attnres_rewrite as ar
from tests.networks import WIDTH, Gpt, Layer, gpt_of, ids
from tests.passes.test_find_stream import search


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def post_norm(s: Layer, x: Tensor) -> Tensor:
    x = rms(x + s.f(x))
    return rms(x + s.g(x))


@pytest.mark.parametrize("size", [(1, 1), (2, 5)], ids=str)
def test_a_norm_of_a_single_token_is_no_factor(size):
    with pytest.raises(ar.PostNormError):
        ar.rewrite(gpt_of(post_norm), (ids(*size),), dynamic_shapes={})


@pytest.mark.parametrize("scaled", [lambda x: x / x.norm(), lambda x: x * torch.sigmoid(x.mean())], ids=["div", "mul"])
def test_a_factor_that_is_made_of_the_sum_does_not_carry_it(scaled):
    with pytest.raises(ar.NoStreamError):
        search(gpt_of(lambda s, x: scaled(x + s.f(s.n1(x)))))


class SkipWeights(Gpt):
    """A U-Net of four layers whose first skip adds the middle state to itself, times a row of a parameter."""

    def __init__(self) -> None:
        super().__init__(4)
        self.skip_weights = nn.Parameter(torch.rand(2, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        x, skips = self.embed(ids), []
        for layer in self.layers[:2]:
            x = layer(x)
            skips.append(x)
        for weight, layer in zip(self.skip_weights, self.layers[2:], strict=True):
            x = layer(x + weight * skips.pop())
        return self.head(self.norm(x))


def test_a_row_of_a_parameter_is_a_factor_of_the_channels():
    (stream,) = search(SkipWeights()).streams
    assert [update.kind for update in stream.updates] == (
        ["residual"] * 4 + ["skip"] + ["residual"] * 2 + ["skip"] + ["residual"] * 2
    )


def test_a_matrix_transpose_carries_the_channels():
    def channels_first(s: Layer, x: Tensor) -> Tensor:
        y = x.mT + s.f(s.n1(x)).mT
        return (y + s.g(s.n2(y.mT)).mT).mT

    (stream,) = search(gpt_of(channels_first)).streams
    assert stream.axes == (2, 1, 1, 1, 1)


def test_forty_factors_in_a_row_are_followed_in_no_time():
    def scaled(s: Layer, x: Tensor) -> Tensor:
        for _ in range(40):
            x = x * s.gain
        return x + s.f(s.n1(x))

    (stream,) = search(gpt_of(scaled)).streams
    assert [len(update.carriers) for update in stream.updates] == [40, 40]
