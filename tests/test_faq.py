"""What docs/faq.md says of each mistake, as numbers."""

from pathlib import Path

import pytest
import torch

import attnres_rewrite as ar
from attnres_rewrite import functional as F
from tests import networks
from tests.wrong_forms import RIGHT, WRONG, errors_of, network, table

PAGE = Path(__file__).parents[1] / "docs" / "faq.md"
INVISIBLE_AT_THE_START = {
    "no final read: the running sum",
    "keys not normalised",
    "logits divided by sqrt(d)",
    "block size in layers of two",
}


def test_right_form_is_the_original_at_zero_queries_and_the_rewrite_at_random_ones():
    start, random = errors_of(RIGHT)
    assert start < 1e-13
    assert random < 1e-13


@pytest.mark.parametrize("name", WRONG)
def test_wrong_form_fails_one_of_the_two_checks(name):
    start, random = errors_of(WRONG[name])
    assert (start < 1e-13) == (name in INVISIBLE_AT_THE_START)
    if name == "queries initialised at std 0.02":
        assert random < 1e-13  # only the start is wrong
    else:
        assert random > 0.1


def test_table_of_the_page_is_what_the_forms_give():
    assert "\n".join(table()) in PAGE.read_text()


def test_queries_of_std_002_make_logits_of_order_one_in_a_wide_model():
    width = 4096
    keys = torch.nn.functional.rms_norm(torch.randn(2000, width), (width,))
    logits = keys @ (0.02 * torch.randn(width))
    assert logits.std().item() == pytest.approx(0.02 * width**0.5, rel=0.1)
    assert round(0.02 * width**0.5, 2) == 1.28


def test_dividing_by_sqrt_d_is_a_query_of_another_length():
    sources, query = [torch.randn(5, 16, dtype=torch.float64) for _ in range(3)], torch.randn(16, dtype=torch.float64)
    keys = torch.stack([torch.nn.functional.rms_norm(source, (16,), eps=1e-6) for source in sources])
    weights = (keys @ query / 4).softmax(0)
    divided = (weights[..., None] * torch.stack(sources)).sum(0)
    torch.testing.assert_close(divided, F.attn_res_read(sources, query / 4), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(divided, F.attn_res_read(sources, query), rtol=1e-2)


def test_scaling_a_source_changes_the_mix_and_not_the_weights():
    sources, query = [torch.randn(5, 16, dtype=torch.float64) for _ in range(3)], torch.randn(16, dtype=torch.float64)
    mix, weights = F.attn_res_read(sources, query, eps=1e-12, return_weights=True)
    scaled = [10 * sources[0], *sources[1:]]
    scaled_mix, scaled_weights = F.attn_res_read(scaled, query, eps=1e-12, return_weights=True)
    torch.testing.assert_close(scaled_weights, weights, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(scaled_mix, mix, rtol=0.1)


def test_block_size_counts_updates_and_block_layers_counts_layers():
    model, args = networks.gpt(depth=6), (networks.ids(),)
    streams = {
        unit: ar.inspect(model, args, config=ar.AttnResConfig(**{unit: 2}), dynamic_shapes={}).streams[0]
        for unit in ("block_size", "block_layers")
    }
    assert {unit: len(stream.blocks) for unit, stream in streams.items()} == {"block_size": 6, "block_layers": 3}
    assert streams["block_size"].reads[-1].num_sources == 7
    assert streams["block_layers"].reads[-1].num_sources == 4


def test_a_language_model_of_l_updates_has_l_queries():
    report = ar.inspect(networks.gpt(depth=3), (networks.ids(),), dynamic_shapes={})
    assert [read.state for read in report.reads] == [1, 2, 3, 4, 5, 6]


def test_a_mean_of_n_sources_multiplies_the_eps_of_the_norm_by_n_squared():
    state, n, eps = torch.randn(7, 16, dtype=torch.float64), 9, 1e-3
    through_mean = torch.nn.functional.rms_norm(state / n, (16,), eps=eps)
    torch.testing.assert_close(through_mean, torch.nn.functional.rms_norm(state, (16,), eps=eps * n**2))


class Unnormed(torch.nn.Module):
    """The plain network with a head that reads the stream without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.body.norm = torch.nn.Identity()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(ids)


def test_mean_is_refused_where_a_reader_has_no_norm_and_sum_is_exact():
    model, ids = Unnormed(), torch.arange(6)
    mean, total = (ar.AttnResConfig(block_size=3, output=output) for output in ("mean", "sum"))
    with pytest.raises(ar.UnpreservedReadError, match="linear .* depends on its scale"):
        ar.rewrite(model, (ids,), config=mean, dynamic_shapes={})
    new = ar.rewrite(model, (ids,), config=total, dynamic_shapes={}, verify=False)
    torch.testing.assert_close(new(ids), model(ids), rtol=1e-12, atol=1e-12)


def test_a_gain_of_zero_makes_every_weight_the_same():
    sources = [torch.randn(5, 16) for _ in range(4)]
    _, weights = F.attn_res_read(sources, torch.randn(16), torch.zeros(16), return_weights=True)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.25))


def test_a_zero_query_has_a_gradient_and_its_gain_follows_one_step_later():
    query, gain = torch.zeros(16, requires_grad=True), torch.ones(16, requires_grad=True)
    sources = [torch.randn(5, 16) for _ in range(3)]
    for step in range(2):
        query.grad = gain.grad = None
        F.attn_res_read(sources, query, gain).square().sum().backward()
        assert query.grad.abs().max() > 1e-3
        assert bool(gain.grad.any()) == (step == 1)
        with torch.no_grad():
            query -= 0.1 * query.grad
