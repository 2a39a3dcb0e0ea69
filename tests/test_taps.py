"""Mirrors attnres_rewrite/taps.py: the small sums that leave a graph."""

import math

import pytest
import torch

from attnres_rewrite.taps import squares, tap, token_moments


def test_the_gradient_of_an_anchor_is_the_sum_of_squares():
    update, anchors = torch.randn(2, 3, 4), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    out = tap(update, anchors[0]) * 3
    out = out + tap(update.clone().requires_grad_(), anchors[1])
    out.sum().backward()
    assert anchors.grad.tolist() == [9.0 * update.numel(), 1.0 * update.numel()]
    assert torch.equal(tap(update, anchors[0]), update)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_squares_do_not_lose_digits(dtype):
    value = torch.randn(999, 65).to(dtype) * 30  # the square of a float16 would overflow in a sum
    count, found = squares(value.requires_grad_())
    assert count == value.numel()
    assert (found.dtype, found.requires_grad) == (torch.float64, False)
    assert found.item() == pytest.approx(value.double().square().sum().item(), rel=1e-6)


def test_moments_over_tokens():
    weights = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    count, mean, deviations = token_moments(weights)
    assert count == 2
    assert mean.tolist() == pytest.approx([0.75, 0.25, math.log(2) / 2, 1.5])
    assert deviations.tolist() == pytest.approx([0.125, 0.125, math.log(2) ** 2 / 2, 0.5])
