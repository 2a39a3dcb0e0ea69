"""Mirrors attnres_rewrite/kernels/inter_block/reference.py: the formula, its limits and its gradients."""

import pytest
import torch

from attnres_rewrite.kernels.inter_block.reference import inter_block
from attnres_rewrite.kernels.read.reference import block_attn_res


def by_formula(sources, queries, gains, eps):
    values = torch.stack(sources)
    keys = values / (values.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    logits = torch.stack([(keys * gain) @ query for query, gain in zip(queries, gains, strict=True)])
    weights = torch.softmax(logits, 1)
    return [*torch.einsum("qn...,n...d->q...d", weights, values), *torch.logsumexp(logits, 1)]


def drawn(num_sources, num_queries, width, *leading, dtype=torch.float64):
    noise = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=noise, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    sources = [make(*leading, width) for _ in range(num_sources)]
    return sources, *([make(width) for _ in range(num_queries)] for _ in range(2))


@pytest.mark.parametrize(
    ("num_sources", "num_queries", "width", "leading"),
    [(1, 2, 7, (3,)), (2, 1, 96, (2, 5)), (9, 3, 7, (0, 4)), (40, 24, 33, (1,))],
)
def test_outputs_and_every_gradient_follow_the_formula(num_sources, num_queries, width, leading):
    sources, queries, gains = drawn(num_sources, num_queries, width, *leading)
    outs, lses = inter_block(sources, queries, gains, 1e-6)
    found, expected = [*outs, *lses], by_formula(sources, queries, gains, 1e-6)
    weights = [torch.randn_like(value) for value in expected]
    inputs = [*sources, *queries, *gains]
    ours, theirs = (torch.autograd.grad(results, inputs, weights) for results in (found, expected))
    for one, other in zip([*found, *ours], [*expected, *theirs], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_each_mix_is_a_read():
    sources, queries, gains = drawn(5, 3, 8, 4)
    outs, _ = inter_block(sources, queries, gains)
    for out, query, gain in zip(outs, queries, gains, strict=True):
        torch.testing.assert_close(out, block_attn_res(sources, query, gain, output="mean"))


def test_half_precision_is_mixed_in_float32_and_cast_once():
    sources, queries, gains = drawn(9, 2, 64, 16, dtype=torch.bfloat16)
    outs, lses = inter_block(sources, queries, gains)
    raised = [[value.float() for value in values] for values in (sources, queries, gains)]
    exact_outs, exact_lses = inter_block(*raised)
    for found, exact in zip([*outs, *lses], [*exact_outs, *exact_lses], strict=True):
        torch.testing.assert_close(found, exact.to(found.dtype), rtol=0, atol=0)
    assert {out.dtype for out in outs} == {torch.bfloat16}
    assert {lse.dtype for lse in lses} == {torch.float32}


def test_large_logits_do_not_overflow():
    sources, queries, _ = drawn(3, 2, 8, 4)
    outs, lses = inter_block(sources, [query * 1e4 for query in queries])
    assert all(torch.isfinite(value).all() for value in (*outs, *lses))
