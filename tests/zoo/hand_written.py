"""Small transformers written here, one awkward habit each, and torch's own encoder."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.spec import HIDDEN, LAYERS, VOCAB, Spec, redraw, token_ids

HEADS = 4


class TorchEncoder(nn.Module):
    """torch.nn.TransformerEncoder between an embedding and a head."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, 96, dropout=0.1, batch_first=True, norm_first=norm_first)
        norm = nn.LayerNorm(HIDDEN) if norm_first else None
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, norm=norm, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(input_ids)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, HEADS, width // HEADS).transpose(1, 2) for part in self.qkv(x).split(width, 2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.proj(mixed.transpose(1, 2).contiguous().view(batch, length, width)))


class MLP(nn.Module):
    """With the GELU spelled out: x + 0.044715 x^3 has the shape of a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.proj = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        x = 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
        return self.dropout(self.proj(x))


class Block(nn.Module):
    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(HIDDEN), Attention()
        self.ln_2, self.mlp = nn.LayerNorm(HIDDEN), MLP()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            x += self.attn(self.ln_1(x))
            x += self.mlp(self.ln_2(x))
            return x
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """A GPT in the style of nanoGPT; `layer` runs one block, and variants override it."""

    num_blocks = LAYERS

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(64, HIDDEN)
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.ModuleList([Block(in_place) for _ in range(self.num_blocks)])
        self.ln_f = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def layer(self, index: int, x: Tensor, earlier: list[Tensor]) -> Tensor:
        """Run block `index` on `x`; `earlier` holds what the blocks before it returned."""
        return self.blocks[index](x)

    def states(self, input_ids: Tensor) -> list[Tensor]:
        """Return what each block returns."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.dropout(self.wte(input_ids) + self.wpe(positions))
        earlier: list[Tensor] = []
        for index in range(len(self.blocks)):
            x = self.layer(index, x, earlier)
            earlier.append(x)
        return earlier

    def forward(self, input_ids: Tensor) -> object:
        return self.lm_head(self.ln_f(self.states(input_ids)[-1]))


class UNet(NanoGPT):
    """The second half adds what the first half returned: skips that are older states."""

    num_blocks = 4

    def layer(self, index: int, x: Tensor, earlier: list[Tensor]) -> Tensor:
        if index >= self.num_blocks // 2:
            x = x + earlier[self.num_blocks - 1 - index]
        return self.blocks[index](x)


class TimeEmbedding(NanoGPT):
    """Before each block something is added that does not read the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(HIDDEN, HIDDEN)

    def layer(self, index: int, x: Tensor, earlier: list[Tensor]) -> Tensor:
        return self.blocks[index](x + self.time(self.wpe.weight[index]))


class Nested(NanoGPT):
    """After each block a branch that is a small residual network of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(
            [nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN)) for _ in range(2)]
        )
        self.inner_ln = nn.LayerNorm(HIDDEN)

    def layer(self, index: int, x: Tensor, earlier: list[Tensor]) -> Tensor:
        x = self.blocks[index](x)
        y = self.inner_ln(x)
        for branch in self.inner:
            y = y + branch(y)
        return x + y


class AuxiliaryHead(NanoGPT):
    """A second head reads the raw stream in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: Tensor) -> object:
        states = self.states(input_ids)
        return self.lm_head(self.ln_f(states[-1])), self.aux(states[1])


class Collect(NanoGPT):
    """Returns its hidden states."""

    def forward(self, input_ids: Tensor) -> object:
        states = self.states(input_ids)
        return self.lm_head(self.ln_f(states[-1])), tuple(states)


def hand_written() -> list[Spec]:
    """Return the models of this file, with their counts."""

    def spec(name: str, build: partial[nn.Module], expected: tuple[int, ...] | str) -> Spec:
        return Spec(name, "hand-written", partial(_built, build), _inputs, expected)

    return [
        spec("torch_encoder", partial(TorchEncoder, True), (2 * LAYERS,)),
        spec("torch_encoder_post_norm", partial(TorchEncoder, False), "PostNormError"),
        spec("nanogpt", partial(NanoGPT), (2 * LAYERS,)),
        spec("nanogpt_in_place", partial(NanoGPT, in_place=True), (2 * LAYERS,)),
        # eight updates and two skips
        spec("nanogpt_unet", partial(UNet), (10,)),
        # six updates and two injections: the first belongs to the root
        spec("nanogpt_time_embedding", partial(TimeEmbedding), (2 * LAYERS + 2,)),
        spec("nanogpt_nested", partial(Nested), (3 * LAYERS,)),
        spec("nanogpt_auxiliary_head", partial(AuxiliaryHead), (2 * LAYERS,)),
        spec("nanogpt_collect", partial(Collect), (2 * LAYERS,)),
    ]


def _built(build: partial[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return redraw(build())


def _inputs() -> dict[str, Tensor]:
    return {"input_ids": token_ids()}
