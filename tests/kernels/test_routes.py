"""Mirrors attnres_rewrite/kernels/routes.py."""

import pytest
import torch

from attnres_rewrite.kernels.routes import (
    launches,
    reset_launches,
    runs_kernel,
    unnoted,
    why_no_kernel,
    why_no_variant_kernel,
    why_not_kernel,
)

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((CUDA, torch.bfloat16, 256, 16384), None),
        ((CPU, torch.bfloat16, 2, 8), None),
        ((CPU, torch.float64, 2, 8), "float64"),
        ((torch.device("meta"), torch.bfloat16, 2, 8), "meta"),
        ((CUDA, torch.float64, 2, 8), "float64"),
        ((CUDA, torch.bfloat16, 257, 8), "257 sources, kernels take 256"),
        ((CUDA, torch.bfloat16, 2, 16385), "16385 channels, kernels take 16384"),
    ],
)
def test_why_no_kernel(arguments, reason):
    pytest.importorskip("triton")
    assert why_no_kernel(*arguments) == reason


def test_an_eager_call_on_a_cpu_is_no_work_for_a_kernel():
    assert why_not_kernel([torch.zeros(2, 8)]) == "cpu"


def test_what_is_unnoted_does_not_count():
    reset_launches()
    with unnoted():
        assert not runs_kernel("read", [torch.zeros(2, 8)])
    assert launches() == {}
    assert not runs_kernel("read", [torch.zeros(2, 8)])
    assert launches() == {"read: plain (cpu)": 1}


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ((1, None, 0.0), None),
        ((4, None, 0.0), "no kernel for num_heads=4"),
        ((1, 8, 0.0), "no kernel for key_rank=8"),
        ((2, None, -1.5), "no kernel for num_heads=2 and recency_bias=-1.5"),
    ],
)
def test_why_no_variant_kernel(variant, reason):
    assert why_no_variant_kernel(*variant) == reason
