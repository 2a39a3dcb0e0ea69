"""Device side of rows.py: functions that kernels share."""

import triton
import triton.language as tl


@triton.jit
def pick(values, index, NUM: tl.constexpr, STEP: tl.constexpr, OFFSET: tl.constexpr):
    """values[index * STEP + OFFSET], for an index below NUM that is known at run time only."""
    chosen = values[OFFSET]
    for i in tl.static_range(1, NUM):
        if index == i:
            chosen = values[i * STEP + OFFSET]
    return chosen


@triton.jit
def row_starts(row, index, sizes, strides, NUM: tl.constexpr, RANK: tl.constexpr):
    """Offsets, in elements, at which the rows (int64) of tensor `index` of NUM start."""
    rest = row
    start = tl.zeros_like(row)
    for i in tl.static_range(RANK - 1):
        dim: tl.constexpr = RANK - 1 - i
        start += (rest % sizes[dim - 1]) * pick(strides, index, NUM, RANK, dim)
        rest = rest // sizes[dim - 1]
    return start + rest * pick(strides, index, NUM, RANK, 0)
