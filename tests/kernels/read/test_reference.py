"""Mirrors attnres_rewrite/kernels/read/reference.py: the formula, its limits and its gradients."""

import pytest
import torch

from attnres_rewrite.kernels.read.reference import block_attn_res


def by_formula(sources, query, gain, eps, output):
    values = torch.stack(sources)
    keys = values / (values.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain
    mix = (torch.softmax(keys @ query, 0).unsqueeze(-1) * values).sum(0)
    return mix * len(sources) if output == "sum" else mix


def drawn(num_sources, width, *leading, dtype=torch.float64):
    noise = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=noise, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    return [make(*leading, width) for _ in range(num_sources)], make(width), make(width)


@pytest.mark.parametrize("output", ["sum", "mean"])
@pytest.mark.parametrize(
    ("num_sources", "width", "leading"), [(1, 7, (3,)), (2, 96, (2, 5)), (9, 7, (0, 4)), (40, 33, (1,))]
)
def test_output_and_every_gradient_follow_the_formula(num_sources, width, leading, output):
    sources, query, gain = drawn(num_sources, width, *leading)
    inputs = [*sources, query, gain]
    found = block_attn_res(sources, query, gain, 1e-6, output)
    expected = by_formula(sources, query, gain, 1e-6, output)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((result * weight).sum(), inputs) for result in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_zero_queries_give_the_plain_sum_and_the_plain_mean():
    sources, query, gain = drawn(5, 8, 4)
    zero = torch.zeros_like(query)
    total = torch.stack(sources).sum(0)
    torch.testing.assert_close(block_attn_res(sources, zero, gain, output="sum"), total)
    torch.testing.assert_close(block_attn_res(sources, zero, gain, output="mean"), total / 5)


def test_half_precision_is_mixed_in_float32_and_cast_once():
    sources, query, gain = drawn(9, 64, 16, dtype=torch.bfloat16)
    found = block_attn_res(sources, query, gain)
    exact = block_attn_res([s.float() for s in sources], query.float(), gain.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.to(torch.bfloat16), rtol=0, atol=0)


def test_large_logits_do_not_overflow():
    sources, query, _ = drawn(3, 8, 4)
    found = block_attn_res(sources, query * 1e4)
    assert torch.isfinite(found).all()
