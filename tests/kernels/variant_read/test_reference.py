"""Mirrors attnres_rewrite/kernels/variant_read/reference.py: the formula, and what each variant is at its default."""

import pytest
import torch
from torch import Tensor

from attnres_rewrite.kernels.read import reference as plain
from attnres_rewrite.kernels.variant_read.reference import variant_attn_res, weights_of


def drawn(num_sources: int, width: int, *leading: int, key_width: int | None = None, dtype=torch.float64):
    noise = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=noise, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    return [make(*leading, width) for _ in range(num_sources)], make(key_width or width), make(key_width or width)


def by_heads(sources, query, gain, eps, output, num_heads, key_rank, bias) -> Tensor:
    """Evaluate head by head: each is a mix of slices by a softmax of its own."""
    values = torch.stack(sources)
    keys = values if key_rank is None else values[..., values.shape[-1] - key_rank :]
    keys = keys / (keys.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain
    added = torch.zeros(len(sources), dtype=values.dtype)
    added[-1] = bias
    mixes = []
    size, key_size = values.shape[-1] // num_heads, keys.shape[-1] // num_heads
    for head in range(num_heads):
        own, own_keys = slice(head * size, (head + 1) * size), slice(head * key_size, (head + 1) * key_size)
        logits = keys[..., own_keys] @ query[own_keys] + added.reshape(-1, *[1] * (values.ndim - 2))
        mixes.append((torch.softmax(logits, 0).unsqueeze(-1) * values[..., own]).sum(0))
    mix = torch.cat(mixes, -1)
    return mix * len(sources) if output == "sum" else mix


@pytest.mark.parametrize("output", ["sum", "mean"])
@pytest.mark.parametrize(
    ("num_sources", "width", "leading", "num_heads", "key_rank", "bias"),
    [
        (1, 7, (3,), 1, 3, 0.0),
        (2, 96, (2, 5), 8, None, 0.0),
        (9, 8, (0, 4), 2, None, -1.5),
        (40, 33, (1,), 1, 33, 2.0),
        (3, 12, (), 12, None, 0.5),
        (4, 5, (2, 3, 2), 1, None, 100.0),
    ],
)
def test_output_and_every_gradient_follow_the_formula(num_sources, width, leading, num_heads, key_rank, bias, output):
    sources, query, gain = drawn(num_sources, width, *leading, key_width=key_rank)
    options = (1e-6, output, num_heads, key_rank, bias)
    found, expected = (f(sources, query, gain, *options) for f in (variant_attn_res, by_heads))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((result * weight).sum(), [*sources, query, gain]) for result in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("key_rank", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_head_with_all_channels_and_no_bias_is_the_plain_read(key_rank, dtype):
    sources, query, gain = drawn(5, 8, 4, dtype=dtype)
    found = variant_attn_res(sources, query, gain, key_rank=key_rank)
    torch.testing.assert_close(found, plain.block_attn_res(sources, query, gain), rtol=0, atol=0)


def test_weights_of_each_head():
    sources, query, gain = drawn(5, 8, 4)
    weights = weights_of(sources, query, gain, 1e-6, 2, None, 0.0)
    assert weights.shape == (4, 2, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, dtype=torch.float64))
    mix = torch.einsum("ths,sthc->thc", weights, torch.stack(sources).unflatten(-1, (2, 4))).flatten(-2)
    torch.testing.assert_close(mix, variant_attn_res(sources, query, gain, output="mean", num_heads=2))


def test_at_zero_queries_a_bias_is_the_log_of_the_odds():
    sources, query, _ = drawn(4, 8, 1)
    weights = weights_of(sources, torch.zeros_like(query), None, 1e-6, 1, None, 2.0)[0, 0]
    torch.testing.assert_close((weights[-1] / weights[0]).log(), torch.tensor(2.0, dtype=torch.float64))


def test_half_precision_is_mixed_in_float32_and_cast_once():
    sources, query, gain = drawn(9, 64, 16, dtype=torch.bfloat16)
    found = variant_attn_res(sources, query, gain, num_heads=4, recency_bias=1.0)
    wide = [source.float() for source in sources]
    exact = variant_attn_res(wide, query.float(), gain.float(), num_heads=4, recency_bias=1.0)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.to(torch.bfloat16), rtol=0, atol=0)


def test_large_logits_do_not_overflow():
    sources, query, _ = drawn(3, 8, 4, dtype=torch.float32)
    found = variant_attn_res(sources, query * 1e4, num_heads=2, recency_bias=1e4)
    assert torch.isfinite(found).all()


def test_a_source_whose_channels_are_not_contiguous():
    sources, query, gain = drawn(3, 8, 4)
    turned = [source.detach().T.contiguous().T for source in sources]
    found = variant_attn_res(turned, query, gain, num_heads=2)
    torch.testing.assert_close(found, variant_attn_res(sources, query, gain, num_heads=2))
