"""A network of two streams that read each other, as image and text do in an MM-DiT; tests share it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16


class Side(nn.Module):
    """What one stream has in a layer: norms, projections, an MLP, and a modulation of all by the condition."""

    def __init__(self, last: bool, gated: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(WIDTH, elementwise_affine=not gated) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH) if gated else None
        self.last = last

    def modulate(self, condition: Tensor) -> list[Tensor]:
        """Return shift, scale and gate of both sub-layers, [B, 1, D] each."""
        if self.modulation is None:
            return [torch.zeros(()), torch.zeros(()), torch.ones(())] * 2
        return list(self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, -1))


class Joint(nn.Module):
    """One attention over the tokens of both, then an MLP for each; the last layer may leave the text as it is."""

    def __init__(self, last: bool = False, gated: bool = True, text_first: bool = True) -> None:
        super().__init__()
        self.image, self.text, self.text_first = Side(False, gated), Side(last, gated), text_first

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        sides, values = [self.image, self.text], [image, text]
        shifts = [side.modulate(condition) for side in sides]
        parts = [
            side.qkv(side.norm_1(x) * (1 + scale) + shift)
            for side, x, (shift, scale, *_) in zip(sides, values, shifts, strict=True)
        ]
        order = [1, 0] if self.text_first else [0, 1]
        q, k, v = (
            t.unflatten(-1, (2, -1)).transpose(1, 2) for t in torch.cat([parts[i] for i in order], 1).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        found = dict(zip(order, mixed.split([values[i].shape[1] for i in order], 1), strict=True))
        for i, (side, (_, _, gate, shift, scale, gate_2)) in enumerate(zip(sides, shifts, strict=True)):
            if not side.last:
                values[i] = values[i] + gate * side.out(found[i])
                values[i] = values[i] + gate_2 * side.mlp(side.norm_2(values[i]) * (1 + scale) + shift)
        return values[0], values[1]


class Single(nn.Module):
    """A layer on the tokens of both: they are put together, and handed on apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([text, image], 1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x[:, text.shape[1] :], x[:, : text.shape[1]]


class MmDit(nn.Module):
    """Image tokens [B, N, D], text tokens [B, M, D] and a condition [B, D] -> image tokens [B, N, D].

    Args:
        depth: Joint layers.
        single: Layers behind them, on the tokens of both.
        last: The last joint layer leaves the text as it is; otherwise its MLP there reaches no output.
        gated: Modulate norms and gate updates by the condition.
        text_first: Of the joint attention.
    """

    def __init__(
        self, depth: int = 3, single: int = 0, last: bool = True, gated: bool = True, text_first: bool = True
    ) -> None:
        super().__init__()
        self.image_in, self.text_in = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        layers = [Joint(last and not single and i == depth - 1, gated, text_first) for i in range(depth)]
        self.layers = nn.ModuleList([*layers, *(Single() for _ in range(single))])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        image, text = self.image_in(image), self.text_in(text)
        for layer in self.layers:
            image, text = layer(image, text, condition)
        return self.head(self.norm(image))


def mm_dit(**options: object) -> tuple[MmDit, tuple[Tensor, Tensor, Tensor]]:
    """Return a network of fixed weights in eval mode, and its inputs."""
    torch.manual_seed(0)
    model = MmDit(**options).eval()  # type: ignore[arg-type]
    return model, (torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH), torch.randn(2, WIDTH))
