"""Networks without a stream that could be rewritten, and the refusal that each must get."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import FeedForward, make_norm
from .networks import redraw

WIDTH = 12


@dataclass(frozen=True, slots=True)
class NegativeSpec:
    """A network that must be refused with the error class of attnres_rewrite.errors named `error`."""

    name: str
    error: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 5, WIDTH)

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        """Return the module in eval mode and its arguments."""
        with torch.random.fork_rng(devices=[]):
            model = self.make().eval()
        draw = torch.Generator().manual_seed(0)
        redraw(model, draw)
        return model, (torch.randn(self.shape, generator=draw),)


class PostNormStack(nn.Module):
    """x = norm(x + f(x)), as in BERT."""

    def __init__(self, norm: str, layers: int) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(FeedForward(WIDTH, "relu") for _ in range(layers))
        self.norms = nn.ModuleList(make_norm(norm, WIDTH) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for body, norm in zip(self.bodies, self.norms, strict=True):
            x = norm(x + body(x))
        return x


class PlainMLP(nn.Module):
    """No residual at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


class ResNet(nn.Module):
    """x = relu(x + f(x)): the sum passes through a nonlinearity, so it is no sum of updates."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))
        self.second = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=True):
            x = F.relu(x + second(F.relu(first(x))))
        return x.mean(dim=(2, 3))


class ChangingWidth(nn.Module):
    """The width grows behind every single update."""

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH + 4 * layer for layer in range(4)]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.bodies = nn.ModuleList(FeedForward(width, "relu") for width in widths)
        self.grow = nn.ModuleList(nn.Linear(width, width + 4) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        for norm, body, grow in zip(self.norms, self.bodies, self.grow, strict=True):
            x = grow(x + body(norm(x)))
        return x


class SingleUpdate(nn.Module):
    """One update: a stream of one block has nothing to attend over."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(WIDTH), FeedForward(WIDTH, "swiglu")
        self.out = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.body(self.norm(x)))


class GatedHighway(nn.Module):
    """x = g(x) * x + (1 - g(x)) * f(x): the stream is scaled by a gate that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.bodies = nn.ModuleList(FeedForward(WIDTH, "relu") for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for gate, body in zip(self.gates, self.bodies, strict=True):
            g = torch.sigmoid(gate(x))
            x = g * x + (1.0 - g) * body(x)
        return x


def negative_specs() -> tuple[NegativeSpec, ...]:
    """Return every network that must be refused."""
    return (
        NegativeSpec("post_norm_layer", "PostNormError", lambda: PostNormStack("layer", 4)),
        NegativeSpec("post_norm_rms", "PostNormError", lambda: PostNormStack("rms_hf", 3)),
        NegativeSpec("post_norm_two_layers", "PostNormError", lambda: PostNormStack("layer_no_bias", 2)),
        NegativeSpec("plain_mlp", "NoStreamError", PlainMLP),
        NegativeSpec("relu_after_add", "NoStreamError", ResNet, (2, WIDTH, 6, 6)),
        NegativeSpec("changing_width", "NoStreamError", ChangingWidth),
        NegativeSpec("single_update", "NoStreamError", SingleUpdate),
        NegativeSpec("gated_highway", "NoStreamError", GatedHighway),
    )
