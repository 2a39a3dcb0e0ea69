"""Mirrors attnres_rewrite/kernels/rows.py: where rows of several tensors start. The kernels tests cover rows_of()."""

import pytest
import torch

from attnres_rewrite.kernels.rows import alignment

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
