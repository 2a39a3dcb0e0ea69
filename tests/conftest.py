"""For all tests: one thread a process, no model hub, kernels in Triton's interpreter where there is no GPU."""

import os
from pathlib import Path

# before triton is imported; a machine without an NVIDIA driver has no such file
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.zoo.torchvision_cure import define_missing_ops

# before anything imports transformers, which imports torchvision where timm has brought it
define_missing_ops()

# the tensors are tiny and the tests run side by side: more threads only wait for each other
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers in every run, whatever ran before it."""
    torch.manual_seed(0)
