"""The wrong numbers of Inductor before torch 2.14, with and without our mend, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnres_rewrite.inductor_fix import MENDED_IN

# the gradient of a norm whose input lies transposed: `h` passes from the sums to what is made of them
COMPARED = """
import torch

def gradient(a, b, c, d, gain, transposed):
    h = (a + b + c + d) * gain
    x = transposed.t()
    return h - h.sum(-1, keepdim=True) - x * (h * x).sum(-1, keepdim=True)

torch.manual_seed(0)
square = [torch.randn(32, 32, dtype=torch.float64) for _ in range(5)]
args = (*square[:4], torch.randn(32, dtype=torch.float64), square[4])
print((torch.compile(gradient)(*args) - gradient(*args)).abs().max().item())
"""
REWRITE = """
import torch
import attnres_rewrite as ar
from tests.networks import gpt, ids

ar.rewrite(gpt(), (ids(),), verify=False)
"""
COMPILE_ATTACHED = """
import torch
import attnres_rewrite as ar
from tests.networks import gpt, ids

model = gpt()
ar.attach(model, ar.AttnResConfig(), (ids(),))
torch.compile(model, backend="attnres")(ids())
"""


def error_after(setup: str, cache: Path) -> float:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", setup + COMPARED], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ >= MENDED_IN, reason="torch is mended")
def test_torch_alone_is_wrong_and_what_it_cached_is_not_used(tmp_path):
    assert error_after("", tmp_path) > 1
    assert error_after(REWRITE, tmp_path) < 1e-12


@pytest.mark.parametrize("setup", [REWRITE, pytest.param(COMPILE_ATTACHED, marks=pytest.mark.slow)])
def test_it_is_right_beside_a_rewrite(setup, tmp_path):
    assert error_after(setup, tmp_path) < 1e-12
