"""Mirrors attnres_rewrite/passes/channel_axis.py: which axis a stream is mixed along."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnres_rewrite.capture import capture
from attnres_rewrite.errors import NoStreamError
from attnres_rewrite.passes.find_stream import find_stream
from attnres_rewrite.passes.normalize_adds import normalize_adds
from attnres_rewrite.records import ResidualStream

WIDTH, TOKENS = 8, 6


class Net(nn.Module):
    """Two updates of a fixed number of tokens, each f(x) of what the test gives."""

    def __init__(self, update: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.update = nn.Linear(WIDTH, WIDTH), update
        self.layer, self.gate, self.tokens = (nn.Linear(n, n) for n in (WIDTH, WIDTH, TOKENS))
        self.gain, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.update(self, x)
        return x + self.update(self, x)


def stream_of(update: Callable[[Net, Tensor], Tensor]) -> ResidualStream:
    gm = capture(Net(update), (torch.randn(2, TOKENS, WIDTH),), dynamic_shapes={}, both_modes=False).programs[True]
    normalize_adds(gm)
    (stream,) = find_stream(gm).streams
    return stream


def squeeze_and_excite(net: Net, x: Tensor) -> Tensor:
    return net.layer(x) * torch.sigmoid(net.gate(x.mean(1, keepdim=True)))


def rms_norm(net: Net, x: Tensor) -> Tensor:
    return net.layer(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * net.gain)


def layer_norm(net: Net, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return net.layer((x - mean) / torch.sqrt(variance + 1e-5))


def unit_length(net: Net, x: Tensor) -> Tensor:
    return net.layer(nn.functional.normalize(x, dim=-1))


@pytest.mark.parametrize("update", [squeeze_and_excite, rms_norm, layer_norm, unit_length])
def test_the_channels_are_found(update: Callable[[Net, Tensor], Tensor]) -> None:
    stream = stream_of(update)
    assert (stream.axes, stream.width) == ((2, 2, 2), WIDTH)


def test_a_norm_over_the_tokens_that_no_layer_agrees_with_is_refused() -> None:
    def update(net: Net, x: Tensor) -> Tensor:
        return net.layer(x / x.norm(dim=1, keepdim=True))

    with pytest.raises(NoStreamError, match=r"its readers name axis 1, the layers around it axes \[2\]"):
        stream_of(update)


def test_a_layer_over_the_tokens_does_not_decide_alone() -> None:
    def update(net: Net, x: Tensor) -> Tensor:
        mixed = net.tokens(x.transpose(1, 2)).transpose(1, 2)
        return net.layer(mixed * net.gain + net.bias)

    with pytest.raises(NoStreamError, match=r"its readers name axis 1, the layers around it axes \[1, 2\]"):
        stream_of(update)
