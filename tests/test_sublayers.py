"""Mirrors attnres_rewrite/sublayers.py: which state an update reads, whose it is, attention or MLP."""

import pytest
import torch
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.sublayers import Sublayer, kind_before, sublayers_of
from tests.networks import Gpt, Layer, Mlp, gpt, gpt_of, ids


def found_in(model: nn.Module) -> tuple[Sublayer, ...]:
    new = ar.rewrite(model, (ids(),), config=ar.AttnResConfig(num_blocks=1), verify=False)
    return sublayers_of(new.programs[False].plans[0].stream)


def test_attention_and_mlp_by_turns():
    sublayers = found_in(gpt(2))
    assert sublayers == (
        Sublayer("layers.0.attn", 0, "attention"),
        Sublayer("layers.0.mlp", 1, "mlp"),
        Sublayer("layers.1.attn", 2, "attention"),
        Sublayer("layers.1.mlp", 3, "mlp"),
    )
    assert [kind_before(state, sublayers) for state in range(5)] == ["attention", "mlp", "attention", "mlp", ""]


def parallel(layer: Layer, x: Tensor) -> Tensor:
    return x + layer.f(layer.n1(x)) + layer.g(layer.n2(x))


def test_parallel_updates_read_one_state():
    assert [(of.owner, of.reads) for of in found_in(gpt_of(parallel))] == [
        ("layers.0.f", 0),
        ("layers.0.g", 0),
        ("layers.1.f", 2),
        ("layers.1.g", 2),
    ]


def test_what_an_update_of_both_kinds_is_called():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attn, self.mlp = nn.LayerNorm(16), nn.Linear(16, 16), Mlp()

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + (self.attn(y) + self.mlp(y)).sin()

    torch.manual_seed(0)
    sublayers = found_in(Gpt(2, block=Both).eval())
    assert [(of.reads, of.kind) for of in sublayers] == [(0, ""), (1, "")]


def test_an_injection_reads_no_state_and_a_skip_an_old_one():
    class Skipping(Gpt):
        def forward(self, ids: Tensor) -> Tensor:
            x = first = self.embed(ids)
            x = self.layers[0](x)
            x = x + self.embed.weight[: ids.shape[1]]
            x = self.layers[1](x + first)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    sublayers = found_in(Skipping(2).eval())
    assert [of.reads for of in sublayers] == [0, 1, None, 0, 4, 5]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("FeedForward", "mlp"),
        ("LayerFF", "mlp"),
        ("SelfAttn", "attention"),
        ("MoeAttention", "attention"),
        ("AttnMoeMlp", "mlp"),
    ],
)
def test_classes_tell_where_names_do_not(name, kind):
    body = type(name, (Mlp,), {})

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.post_attention_layernorm, self.inner = nn.LayerNorm(16), body()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(self.post_attention_layernorm(x))

    torch.manual_seed(0)
    assert {of.kind for of in found_in(Gpt(2, block=Plain).eval())} == {kind}
