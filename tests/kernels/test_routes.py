"""Mirrors attnres_rewrite/kernels/routes.py."""

import pytest
import torch

from attnres_rewrite.kernels.routes import why_no_kernel, why_not_triton

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((CUDA, torch.bfloat16, 256, 16384), None),
        ((CPU, torch.bfloat16, 2, 8), "cpu"),
        ((CUDA, torch.float64, 2, 8), "float64"),
        ((CUDA, torch.bfloat16, 257, 8), "257 sources, kernels take 256"),
        ((CUDA, torch.bfloat16, 2, 16385), "16385 channels, kernels take 16384"),
    ],
)
def test_why_no_kernel(arguments, reason):
    pytest.importorskip("triton")
    assert why_no_kernel(*arguments) == reason


def test_tensors_on_a_cpu_are_no_work_for_a_kernel():
    assert why_not_triton([torch.zeros(2, 8)]) == "cpu"
