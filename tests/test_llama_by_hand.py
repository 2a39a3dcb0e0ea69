"""A rewritten Llama against an Attention Residuals Llama written by hand from the paper (arXiv 2603.15031).

The model below is module style, sums and mixes as the paper's pseudo-code does, and shares no code with the
package: no captured graph, no read op, no interpreter. Norms are in the dtype of the model, so float64 throughout.
"""

import math

import pytest
import torch
from torch import Tensor, nn

import attnres_rewrite as ar

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

VOCAB, WIDTH, LAYERS, HEADS, HIDDEN = 53, 32, 6, 4, 48


class RmsNorm(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(WIDTH)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        length, size = x.shape[1], WIDTH // HEADS
        q, k, v = (
            p(x).view(*x.shape[:2], HEADS, size).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        angle = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, size, 2).double() / size))
        cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
        q, k = (t * cos + torch.cat([-t[..., size // 2 :], t[..., : size // 2]], -1) * sin for t in (q, k))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(size)).masked_fill(
            torch.ones(length, length).triu(1).bool(), -math.inf
        )
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))


class DepthAttention(nn.Module):
    """softmax over the sources of w . RMSNorm(v), values not normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key_norm = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, sources: list[Tensor]) -> Tensor:
        values = torch.stack(sources, dim=-2)  # [B, T, S, D]
        keys = values / (values.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.key_norm
        return ((keys @ self.query).softmax(-1).unsqueeze(-1) * values).sum(-2)


class AttnResLlama(nn.Module):
    """Blocks of `block_size` sub-layers; every sub-layer and the output read the depth."""

    def __init__(self, block_size: int, eps: float) -> None:
        super().__init__()
        self.block_size = block_size
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.norms = nn.ModuleList(RmsNorm(eps) for _ in range(2 * LAYERS))
        self.sublayers = nn.ModuleList(Attention() if i % 2 == 0 else Mlp() for i in range(2 * LAYERS))
        self.reads = nn.ModuleList(DepthAttention() for _ in range(2 * LAYERS))  # of sub-layers 1.. and the output
        self.norm = RmsNorm(eps)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        blocks = [self.embed(ids)]
        partial: Tensor | None = None
        hidden = blocks[0]
        for i, (norm, sublayer) in enumerate(zip(self.norms, self.sublayers, strict=True)):
            update = sublayer(norm(hidden))
            partial = update if partial is None else partial + update
            sources = [*blocks, partial]
            if (i + 1) % self.block_size == 0:
                blocks, partial = sources, None
            hidden = self.reads[i](sources)
        return self.head(self.norm(hidden))


def parameters_by_hand(by_hand: AttnResLlama, new: ar.RewrittenModule) -> list[tuple[str, Tensor, Tensor]]:
    """Return (name, parameter of the hand-written model, its twin in the rewritten one)."""
    theirs = dict(new.named_parameters())
    pairs = [("embed", by_hand.embed.weight, theirs["model.embed_tokens.weight"])]
    pairs += [
        ("norm", by_hand.norm.weight, theirs["model.norm.weight"]),
        ("head", by_hand.head.weight, theirs["lm_head.weight"]),
    ]
    for i in range(2 * LAYERS):
        layer = f"model.layers.{i // 2}"
        norm = "input_layernorm" if i % 2 == 0 else "post_attention_layernorm"
        part = "self_attn" if i % 2 == 0 else "mlp"
        pairs.append((f"{layer}.{norm}", by_hand.norms[i].weight, theirs[f"{layer}.{norm}.weight"]))
        for name, own in by_hand.sublayers[i].named_parameters():
            pairs.append((f"{layer}.{part}.{name}", own, theirs[f"{layer}.{part}.{name}"]))
    for read, own in zip(new.report.reads, by_hand.reads, strict=True):
        stem = read.query_name.removesuffix(".query")
        pairs += [(f"{stem}.{leaf}", getattr(own, leaf), theirs[f"{stem}.{leaf}"]) for leaf in ("query", "key_norm")]
    return pairs


@pytest.mark.parametrize(
    "block_size", [1, pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_rewritten_llama_is_the_attention_residuals_llama_of_the_paper(block_size, monkeypatch):
    # transformers' norm and rotary embedding go through float32; here everything stays in float64
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=HIDDEN, rms_norm_eps=1e-6, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = in_float64(transformers.LlamaForCausalLM(config).eval(), monkeypatch)
    tokens = torch.randint(0, VOCAB, (2, 9))
    new = ar.rewrite(model, (tokens,), config=ar.AttnResConfig(block_size=block_size, output="mean"))
    by_hand = AttnResLlama(block_size, config.rms_norm_eps).double()
    pairs = parameters_by_hand(by_hand, new)
    assert len(pairs) == len(list(by_hand.parameters())) == len(list(new.parameters()))
    with torch.no_grad():
        for name, own, twin in pairs:
            if name.endswith("query"):
                twin.normal_(std=WIDTH**-0.5)
            elif name.endswith("norm"):
                twin.normal_(1, 0.1)
            own.copy_(twin)

    expected, found = by_hand(tokens), new(tokens).logits
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()

    assert relative(found, expected) < 1e-10
    for name, own, twin in pairs:
        assert relative(twin.grad, own.grad) < 1e-10, name


def in_float64(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Make a Hugging Face Llama work in float64 inside its norms and rotary embedding too."""
    from transformers.models.llama import modeling_llama

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        size = WIDTH // HEADS
        frequency = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = position_ids[..., None].double() * frequency
        both = torch.cat([angle, angle], -1)
        return both.cos(), both.sin()

    def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.softmax(x, dim)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotary)
    monkeypatch.setattr(modeling_llama.nn.functional, "softmax", softmax)
    return model.double()


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float(((found - expected).abs().max() / expected.abs().max()).detach())
