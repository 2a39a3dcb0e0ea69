"""Small networks that the tests share. Each is a plain module a user might write."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH = 31, 16


class Attention(nn.Module):
    """Causal self-attention with two heads."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """A hidden layer with GELU written by hand: its inner sum x + 0.044715 x^3 is no residual."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return self.down(h)


class Block(nn.Module):
    """One pre-norm layer, two updates."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm_2, self.mlp = nn.LayerNorm(width), Mlp(width)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm_1(x)))
        return x + self.drop(self.mlp(self.norm_2(x)))


class Gpt(nn.Module):
    """A pre-norm language model with a tied head."""

    def __init__(self, depth: int = 3, dropout: float = 0.0, block: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(block() if block else Block(dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Layer(nn.Module):
    """A layer whose forward is given: `step(self, x)`. It owns two norms and two sub-layers."""

    def __init__(self, step: Callable[["Layer", Tensor], Tensor]) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.f, self.g = Mlp(), Mlp()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def gpt_of(step: Callable[[Layer, Tensor], Tensor], depth: int = 2) -> Gpt:
    """Return a model whose layers do `step`, in eval mode, with seeded weights."""
    torch.manual_seed(0)
    return Gpt(depth, block=lambda: Layer(step)).eval()


def gpt(depth: int = 3, dropout: float = 0.0) -> Gpt:
    """Return a plain GPT in eval mode, with seeded weights."""
    torch.manual_seed(0)
    return Gpt(depth, dropout).eval()


def ids(batch: int = 2, length: int = 5) -> Tensor:
    """Return token ids [batch, length]."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


@functools.cache
def exported_gpt(depth: int = 3) -> torch.export.ExportedProgram:
    """Return gpt(depth) captured at ids() with fixed shapes: for tests of many configs."""
    return torch.export.export(gpt(depth), (ids(),), strict=False)
