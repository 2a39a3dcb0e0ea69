import pytest
import torch
from torch.nn import functional as F

from attnres_rewrite.keyed_random import (
    keyed_attention,
    keyed_bernoulli,
    keyed_bits,
    keyed_dropout,
    keyed_uniform,
    make_key,
)

KEY = make_key(1, 2, 3)
MANY = 200_000


def test_bits_are_known():
    # worked out with Python's integers, by the formula of the module
    def mix(word):
        word = (word ^ (word >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
        word = (word ^ (word >> 15)) * 0x735A2D97 & 0xFFFFFFFF
        return word ^ (word >> 15)

    first = mix((int(KEY) + 5 * 0x9E3779B1) & 0xFFFFFFFF)
    second = mix(first ^ 0x5BF03635)
    wanted = [mix((mix(place ^ first) + second) & 0xFFFFFFFF) for place in range(12)]
    assert keyed_bits((3, 4), KEY, 5, "cpu").flatten().tolist() == wanted


def test_fractions_are_uniform_and_sites_keys_and_neighbours_do_not_correlate():
    def draw(key, site):
        return keyed_uniform((MANY,), key, site, "cpu", torch.float64)

    base = draw(KEY, 0)
    assert base.min() >= 0
    assert base.max() < 1
    # five standard deviations of each estimate
    assert abs(base.mean() - 0.5) < 5 * (1 / 12 / MANY) ** 0.5
    assert abs(base.var() - 1 / 12) < 5 * (1 / 180 / MANY) ** 0.5
    others = [draw(KEY, 1), draw(make_key(1, 2, 4), 0), draw(make_key(1, 3, 3), 0), draw(make_key(2, 2, 3), 0)]
    for other in [*others, base.roll(1), base.roll(1024)]:
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1]
        assert abs(correlation) < 5 / MANY**0.5


def test_limits():
    drawn = keyed_uniform(torch.empty(50, 3), KEY, 0, "cpu", torch.float32, -2.0, 3.0)
    assert drawn.shape == (50, 3)
    assert drawn.dtype == torch.float32
    assert -2 <= drawn.min() < -1
    assert 2 < drawn.max() < 3


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_drops_a_share_and_keeps_the_mean(p):
    x = torch.ones(MANY, dtype=torch.float64, requires_grad=True)
    y = keyed_dropout(x, p, KEY, 0)
    kept = y != 0
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / MANY) ** 0.5 + 1e-12
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p) if p < 1 else 0.0))
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())


def test_dropout_depends_on_places_and_not_on_strides():
    x = torch.ones(6, 8)
    torch.testing.assert_close(keyed_dropout(x.t().contiguous().t(), 0.5, KEY, 0), keyed_dropout(x, 0.5, KEY, 0))


def test_whole_channels():
    y = keyed_dropout(torch.ones(4, 8, 5, 5), 0.5, KEY, 0, whole_channels=True)
    assert set(y.sum((2, 3)).flatten().tolist()) == {0.0, 50.0}


@pytest.mark.parametrize("probability", [0.3, torch.full((MANY,), 0.3)])
def test_bernoulli(probability):
    drawn = keyed_bernoulli(probability, torch.empty(MANY, dtype=torch.float64), KEY, 0)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert abs(drawn.mean() - 0.3) < 5 * (0.21 / MANY) ** 0.5


@pytest.mark.parametrize("case", ["plain", "causal", "bool mask", "float mask", "grouped", "scaled"])
def test_attention_without_dropout_is_torchs(case):
    query, key, value = (
        torch.randn(2, heads, 5, 8).double() for heads in (4, *((2, 2) if case == "grouped" else (4, 4)))
    )
    mask = {"bool mask": torch.rand(5, 5) > 0.3, "float mask": torch.randn(5, 5).double()}.get(case)
    if case == "bool mask":
        mask[:, 0] = True
    options = {
        "is_causal": case == "causal",
        "scale": 0.2 if case == "scaled" else None,
        "enable_gqa": case == "grouped",
    }
    found = keyed_attention(query, key, value, mask, 0.0, *options.values(), KEY, 0)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value, mask, **options))


def test_a_compiled_draw_is_the_same():
    x = torch.randn(4, 6)
    torch.testing.assert_close(
        torch.compile(keyed_dropout, backend="aot_eager", fullgraph=True)(x, 0.5, KEY, 3), keyed_dropout(x, 0.5, KEY, 3)
    )


# Once NaN, which a row of padding gave; and an error where the mask is wider than the queries
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_attention_looks_as_torch_does_where_it_may_not(kind, dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5) < 0.7
    mask[0, :, 1] = False
    mask = mask if kind == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    exact = [each.double() for each in (query, key, value)]
    wanted = F.scaled_dot_product_attention(*exact, mask if kind == torch.bool else mask.double())
    found = keyed_attention(query, key, value, mask, 0.0, False, None, False, KEY, 0)
    assert found.dtype == dtype
    assert (found - wanted).abs().max() < 8 * torch.finfo(dtype).eps
    assert not found[0, :, 1].any()
    found.float().square().sum().backward()
    assert not any(each.grad.isnan().any() for each in (query, key, value))


# Once 1.0, where torch's own are below
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_uniform_numbers_of_few_digits_stay_below_the_limit(dtype):
    drawn = keyed_uniform((MANY,), KEY, 0, "cpu", dtype)
    assert drawn.max() == 1 - torch.finfo(dtype).eps / 2
    assert abs(drawn.double().mean() - 0.5) < torch.finfo(dtype).eps + 5 * (1 / 12 / MANY) ** 0.5
