"""Mirrors attnres_rewrite/kernels/rows.py: where rows of several tensors start. The kernels tests cover rows_of()."""

import importlib

import pytest
import torch

from attnres_rewrite.kernels.inter_block import op as inter_block_op
from attnres_rewrite.kernels.merge import op as merge_op
from attnres_rewrite.kernels.read import op as read_op
from attnres_rewrite.kernels.rows import alignment
from tests.kernels.budget import DEVICE, drawn

BF16, ROWS = torch.bfloat16, (3, 4, 64)


def test_contiguous_rows_of_whole_loads_are_aligned():
    assert alignment([torch.zeros(ROWS, dtype=BF16)], [torch.zeros(ROWS)]) == 16


@pytest.mark.parametrize(("width", "expected"), [(7, 2), (6, 4), (12, 8), (8, 16), (24, 16)])
def test_rows_start_at_multiples_of_their_width(width, expected):
    assert alignment([torch.zeros(3, width, dtype=BF16)]) == expected


def test_the_least_aligned_of_all_tensors_counts():
    whole = torch.zeros(ROWS, dtype=BF16)
    assert alignment([whole], [torch.zeros(3, 4, 66, dtype=BF16)[..., :64]]) == 4


def test_a_tensor_that_starts_between_two_loads():
    assert alignment([torch.zeros(65, dtype=BF16)[1:].view(1, 64)]) == 2


def test_strides_that_are_never_walked_do_not_count():
    odd = torch.zeros(64, dtype=BF16).as_strided((1, 64), (7, 1))
    repeated = torch.zeros(64, dtype=BF16).expand(ROWS)
    assert alignment([odd], [repeated]) == 16


def test_rows_of_no_tensors():
    assert alignment([], [torch.zeros(0, 64, dtype=BF16)]) == 16


class Guard:
    """torch.cuda.device_of, which remembers whose device is the current one."""

    current: torch.Tensor | None = None

    def __init__(self, tensor):
        self.tensor = tensor

    def __enter__(self):
        Guard.current = self.tensor

    def __exit__(self, *_):
        Guard.current = None


@pytest.mark.parametrize("language", ["triton"], indirect=True)
def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch, language):
    """The current device may be another one, whose stream would not wait for the tensors."""
    launched = {}
    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    for operation in ("read", "inter_block", "merge"):
        for direction in ("forward", "backward"):
            module = importlib.import_module(f"attnres_rewrite.kernels.{operation}.triton_{direction}")
            monkeypatch.setattr(module, "count", lambda name: launched.setdefault(name, Guard.current is not None))
    sources, query, lse = [drawn(4, 16, seed=seed) for seed in range(3)], drawn(16, seed=3), drawn(4, seed=4)
    outs, _ = inter_block_op.inter_block_by_kernel(sources, [query], None, 1e-6)
    read, _ = read_op.read_by_kernel(sources, query, None, 1e-6, "sum")
    merged = merge_op.merge_by_kernel(outs[0], lse, read, query, None, 1e-6, 1.0)
    merged.sum().backward()
    kernels = {
        f"{name}.{direction}" for name in ("read", "inter_block", "merge") for direction in ("forward", "backward")
    }
    assert launched == dict.fromkeys(kernels | {"inter_block.logits"}, True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_the_second_gpu():
    sources = [drawn(64, 96, seed=seed).detach().to("cuda:1") for seed in range(3)]
    query = drawn(96, seed=3).detach()
    found, _ = read_op.read_by_kernel(sources, query.to("cuda:1"), None, 1e-6, "mean")
    wanted, _ = read_op.read_by_kernel([source.to(DEVICE) for source in sources], query, None, 1e-6, "mean")
    assert torch.equal(found.cpu(), wanted.cpu())
