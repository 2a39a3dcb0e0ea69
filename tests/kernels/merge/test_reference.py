"""Mirrors attnres_rewrite/kernels/merge/reference.py: phase 1 and the merge together are the direct read."""

import pytest
import torch

from attnres_rewrite.kernels.inter_block.reference import inter_block
from attnres_rewrite.kernels.merge.reference import add_merge_norm, merge
from attnres_rewrite.kernels.read.reference import block_attn_res
from tests.kernels.budget import drawn


def exact(*shape, seed):
    return drawn(*shape, seed=seed).detach().double().requires_grad_()


def assert_same(found, expected, inputs):
    """Compare outputs and the gradients of every input for one weighting of the outputs."""
    weights = [torch.randn_like(out) for out in expected]
    grads = [torch.autograd.grad(outs, inputs, weights, retain_graph=True) for outs in (found, expected)]
    for ours, theirs in zip([*found, *grads[0]], [*expected, *grads[1]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("output", ["sum", "mean"])
@pytest.mark.parametrize(("num_sources", "width", "leading"), [(1, 7, (3,)), (2, 96, (2, 5)), (9, 7, (0, 4))])
def test_two_phases_are_the_direct_read(num_sources, width, leading, output):
    sources = [exact(*leading, width, seed=s) for s in range(num_sources)]
    partial, query, gain = exact(*leading, width, seed=50), exact(width, seed=51), exact(width, seed=52)
    factor = num_sources + 1.0 if output == "sum" else 1.0
    (mix,), (lse,) = inter_block(sources, [query], [gain])
    found = merge(mix, lse, partial, query, gain, factor=factor)
    expected = block_attn_res([*sources, partial], query, gain, output=output)
    assert_same([found], [expected], [*sources, partial, query, gain])


@pytest.mark.parametrize("with_update", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_add_merge_norm_is_the_three_in_turn(norm, affine, with_update):
    rows = [exact(2, 5, 24, seed=s) for s in range(2 + with_update)]
    lse, vectors = exact(2, 5, seed=3), [exact(24, seed=s) for s in range(4, 6 + affine + (affine and norm == "layer"))]
    partial, inter_out, *update = rows
    query, gain, *weight_bias = vectors
    weight, bias = [*weight_bias, None, None][:2]
    found = add_merge_norm(partial, *(update or [None]), inter_out, lse, query, gain, weight, bias, 1e-5, norm=norm)
    total = partial + update[0] if update else partial
    mix = merge(inter_out, lse, total, query, gain)
    if norm == "rms":
        normed = torch.nn.functional.rms_norm(mix, (24,), weight, 1e-5)
    else:
        normed = torch.nn.functional.layer_norm(mix, (24,), weight, bias, 1e-5)
    assert_same(found, [total, normed], [*rows, lse, *vectors])


def test_half_precision_rounds_the_sum_and_not_the_mix():
    partial, update, inter_out = (drawn(16, 64, dtype=torch.bfloat16, seed=s) for s in range(3))
    lse, query, weight = drawn(16, seed=3), drawn(64, seed=4), drawn(64, seed=5)
    total, normed = add_merge_norm(partial, update, inter_out, lse, query, None, weight, None, 1e-5)
    mix = merge(inter_out.float(), lse, total.float(), query)
    expected = torch.nn.functional.rms_norm(mix, (64,), weight, 1e-5).to(torch.bfloat16)
    torch.testing.assert_close(total, partial + update, rtol=0, atol=0)
    assert normed.dtype == torch.bfloat16
    # one unit in the last place, where the two orders of float32 sums round differently
    torch.testing.assert_close(normed, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("logit_minus_lse", [80.0, -80.0])
def test_both_shares_are_exact_when_tiny(logit_minus_lse):
    ones, zeros, query = torch.ones(3, 8), torch.zeros(3, 8), torch.zeros(8)
    lse = torch.full((3,), -logit_minus_lse)
    small = merge(ones, lse, zeros, query) if logit_minus_lse > 0 else merge(zeros, lse, ones, query)
    torch.testing.assert_close(small.double(), torch.full((3, 8), -80.0).double().exp(), rtol=1e-6, atol=0)
