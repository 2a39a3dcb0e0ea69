"""The small parts of a generated network: adds, norms, drops, MLPs.

Every true update is the whole forward of an Add of its own, so its FQN names the update. All other
adds here (gelu, experts, nested sub-networks) are not updates.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .specs import NetworkSpec

ALPHA = 0.75


def _iadd(x: Tensor, f: Tensor) -> Tensor:
    x += f
    return x


ADDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + f": lambda x, f: x + f,
    "f + x": lambda x, f: f + x,
    "torch.add(x, f)": lambda x, f: torch.add(x, f),
    "torch.add(x, f, alpha)": lambda x, f: torch.add(x, f, alpha=ALPHA),
    "torch.add(f, x, alpha)": lambda x, f: torch.add(f, x, alpha=ALPHA),
    "x += f": _iadd,
    "x.add_(f)": lambda x, f: x.add_(f),
    "f += x": lambda x, f: _iadd(f, x),
}


class Add(nn.Module):
    """x + f in one spelling. `injects`: f does not read the stream."""

    def __init__(self, spelling: str, injects: bool = False) -> None:
        super().__init__()
        self.spelling = spelling
        self.injects = injects

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        return ADDS[self.spelling](x, f)

    def extra_repr(self) -> str:
        return self.spelling


class HandRMSNorm(nn.Module):
    """RMSNorm written out; `spelling` is one of the rms_* values of NetworkSpec.norm."""

    def __init__(self, width: int, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        if spelling in ("rms_hf", "rms_gemma"):
            # (1 + weight) starts at zero
            self.weight = nn.Parameter(torch.ones(width) if spelling == "rms_hf" else torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "rms_plain":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.spelling == "rms_sqrt":
            return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)
        if self.spelling == "rms_gemma":
            h = x.float()
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (h * (1.0 + self.weight.float())).type_as(x)
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6)
        return self.weight * x.to(dtype)


def make_norm(kind: str, width: int) -> nn.Module:
    """Return a norm over the last axis."""
    if kind == "layer":
        return nn.LayerNorm(width)
    if kind == "layer_no_bias":
        return nn.LayerNorm(width, bias=False)
    if kind == "layer_plain":
        return nn.LayerNorm(width, elementwise_affine=False)
    if kind == "rms":
        return nn.RMSNorm(width, eps=1e-6)
    return HandRMSNorm(width, kind)


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth as timm spells it."""

    def __init__(self, rate: float = 0.2) -> None:
        super().__init__()
        self.keep = 1.0 - rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(self.keep)
        mask.div_(self.keep)
        return x * mask


class Finish(nn.Module):
    """What a branch does before it is added: norm on its output, LayerScale, dropout."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.norm = make_norm(spec.norm, spec.width) if spec.norm_place != "pre" else None
        self.scale = LayerScale(spec.width) if spec.layer_scale else None
        drops = {"dropout": nn.Dropout(0.1), "drop_path": DropPath()}
        self.drop = drops.get(spec.drop)

    def forward(self, f: Tensor) -> Tensor:
        for part in (self.norm, self.scale, self.drop):
            f = f if part is None else part(f)
        return f


class FeedForward(nn.Module):
    """A dense MLP: relu, gelu_hand, swiglu or gated."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        hidden = 2 * width
        self.up = nn.Linear(width, hidden, bias=kind != "swiglu")
        self.gate = nn.Linear(width, hidden) if kind in ("swiglu", "gated") else None
        self.down = nn.Linear(hidden, width, bias=kind != "swiglu")

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.kind == "relu":
            return self.down(F.relu(h))
        if self.kind == "gelu_hand":
            # x + c * x**3 looks like an update: it reads what it is added to
            inner = math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))
            return self.down(0.5 * h * (1.0 + torch.tanh(inner)))
        assert self.gate is not None
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * h)
        return self.down(torch.sigmoid(self.gate(x)) * h + h)


class DenseMoE(nn.Module):
    """Top-2 of 3 experts, all computed, plus a shared one: routed + shared is not an update."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 3, bias=False)
        self.experts = nn.ModuleList(FeedForward(width, "relu") for _ in range(3))
        self.shared = FeedForward(width, "swiglu")

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = torch.topk(self.router(x).softmax(-1), 2)
        weights = torch.zeros_like(self.router(x)).scatter(-1, chosen, scores)
        routed = weights[..., :1] * self.experts[0](x)
        for index in (1, 2):
            routed = routed + weights[..., index : index + 1] * self.experts[index](x)
        return routed + self.shared(x)


class LoopMoE(nn.Module):
    """Top-1 of 2 experts, each on its own tokens, gathered by index_add_."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 2, bias=False)
        self.experts = nn.ModuleList(FeedForward(width, "relu") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores, chosen = self.router(flat).softmax(-1).max(dim=-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            (tokens,) = torch.where(chosen == index)
            out.index_add_(0, tokens, expert(flat[tokens]) * scores[tokens, None])
        return out.view(x.shape)


class NestedResidual(nn.Module):
    """Two residual MLPs inside a branch: their adds are updates of nobody's stream."""

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(make_norm(norm, width) for _ in range(2))
        self.bodies = nn.ModuleList(FeedForward(width, "relu") for _ in range(2))

    def forward(self, y: Tensor) -> Tensor:
        for norm, body in zip(self.norms, self.bodies, strict=True):
            y = y + body(norm(y))
        return y


def make_mlp(kind: str, spec: NetworkSpec) -> nn.Module:
    """Return an MLP over the last axis, for any leading axes."""
    if kind == "moe_dense":
        return DenseMoE(spec.width)
    if kind == "moe_loop":
        return LoopMoE(spec.width)
    if kind == "nested":
        return NestedResidual(spec.width, spec.norm)
    return FeedForward(spec.width, kind)
