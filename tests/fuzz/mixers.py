"""Token mixers of a generated network: attention, cross-attention, recurrences; (B, T, C) -> (B, T, C).

Rotary embeddings, masks, ALiBi, relative positions, recurrences and the delta rule all add tensors,
some of them in every layer. None of these adds is an update.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .specs import NetworkSpec


@dataclass(frozen=True, slots=True)
class Context:
    """What all layers of one stack share: a bias on the scores and the states of the encoder."""

    bias: Tensor | None = None  # [B, heads, T, T]
    memory: Tensor | None = None  # [B, T_encoder, C]


class ScoreBias(nn.Module):
    """Build the bias that every layer adds to its scores, once, in full shape [B, heads, T, T].

    In full shape the bias of layer 1 on is an ancestor of the scores it is added to.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.kind, self.heads = spec.scores, spec.heads
        self.table = nn.Embedding(32, spec.heads) if self.kind == "relative" else None

    def forward(self, batch: int, length: int, like: Tensor) -> Tensor:
        at = torch.arange(length, device=like.device)
        distance = at[None, :] - at[:, None]
        if self.table is not None:
            bias = self.table(distance + 16).permute(2, 0, 1)
        elif self.kind == "alibi":
            slopes = 0.5 ** torch.arange(1, self.heads + 1, device=like.device, dtype=like.dtype)
            bias = slopes[:, None, None] * distance.to(like.dtype)
        else:
            bias = torch.zeros(self.heads, length, length, device=like.device, dtype=like.dtype)
            bias = bias.masked_fill(distance > 0, float("-inf"))
        return bias[None].expand(batch, -1, -1, -1).contiguous()


def _rotate(x: Tensor) -> Tensor:
    """Rotary embedding of [B, heads, T, d]: its add is not an update."""
    half = x.shape[-1] // 2
    speed = 100.0 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None] * speed
    cos, sin = (torch.cat((f, f), dim=-1) for f in (angle.cos(), angle.sin()))
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class Attention(nn.Module):
    """Softmax attention of x over itself, or over context.memory when `cross`."""

    def __init__(self, spec: NetworkSpec, cross: bool = False) -> None:
        super().__init__()
        inner = spec.heads * spec.head_dim
        self.heads, self.cross = spec.heads, cross
        self.rotary = spec.rotary and not cross
        self.causal = spec.scores == "sdpa_causal" and not cross
        self.dropout = 0.1 if spec.drop == "attention" else 0.0
        self.query = nn.Linear(spec.width, inner)
        self.key = nn.Linear(spec.width, inner, bias=False)
        self.value = nn.Linear(spec.width, inner)
        self.out = nn.Linear(inner, spec.width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        memory = context.memory if self.cross else x
        assert memory is not None
        q, k, v = self._split(self.query(x)), self._split(self.key(memory)), self._split(self.value(memory))
        if self.rotary:
            q, k = _rotate(q), _rotate(k)
        if context.bias is None or self.cross:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            y = (scores + context.bias).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Scan(nn.Module):
    """A gated linear recurrence h = a * h + b with mamba's skip y + u * D."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        inner = spec.heads * spec.head_dim
        self.inp = nn.Linear(spec.width, 3 * inner)
        self.D = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, spec.width, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        u, decay, gate = self.inp(x).chunk(3, dim=-1)
        a, b = torch.sigmoid(decay), F.silu(u)
        h = torch.zeros_like(b[:, 0])
        ys = []
        for t in range(x.shape[1]):
            h = a[:, t] * h + b[:, t]
            ys.append(h)
        y = torch.stack(ys, dim=1)
        return self.out((y + b * self.D) * torch.sigmoid(gate))


class DeltaRule(nn.Module):
    """Linear attention whose memory is corrected: S = S + k (v - S k), a residual add of its own kind."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.dim = spec.head_dim
        self.inp = nn.Linear(spec.width, 3 * self.dim, bias=False)
        self.beta = nn.Linear(spec.width, 1)
        self.out = nn.Linear(self.dim, spec.width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.inp(x).split(self.dim, dim=-1)
        k, beta = F.normalize(k, dim=-1), torch.sigmoid(self.beta(x))
        S = x.new_zeros(x.shape[0], self.dim, self.dim)
        ys = []
        for t in range(x.shape[1]):
            recalled = (S * k[:, t, :, None]).sum(dim=-2)
            error = (v[:, t] - recalled) * beta[:, t]
            S = S + k[:, t, :, None] * error[:, None, :]
            ys.append((S * q[:, t, :, None]).sum(dim=-2))
        return self.out(torch.stack(ys, dim=1))


def make_mixer(kind: str, spec: NetworkSpec) -> nn.Module:
    """Return a module (x, context) -> f of the kind that the spec names."""
    mixers = {"softmax": Attention, "scan": Scan, "delta": DeltaRule}
    return mixers[kind](spec)
