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
def pick_stride(strides, index, NUM: tl.constexpr, RANK: tl.constexpr, DIM: tl.constexpr):
    """The stride of tensor `index` in one dimension. A launch passes one that fits as int32, another as int64."""
    chosen = tl.cast(strides[DIM], tl.int64)
    for i in tl.static_range(1, NUM):
        if index == i:
            chosen = tl.cast(strides[i * RANK + DIM], tl.int64)
    return chosen


@triton.jit
def row_starts(row, index, sizes, strides, NUM: tl.constexpr, RANK: tl.constexpr):
    """Offsets, in elements, at which the rows (int64) of tensor `index` of NUM start."""
    rest = row
    start = tl.zeros_like(row)
    for i in tl.static_range(RANK - 1):
        # no constexpr of its own: the compiler, unlike the interpreter, takes the second turn's for another assignment
        start += (rest % sizes[RANK - 2 - i]) * pick_stride(strides, index, NUM, RANK, RANK - 1 - i)
        rest = rest // sizes[RANK - 2 - i]
    return start + rest * pick_stride(strides, index, NUM, RANK, 0)


@triton.jit
def pick_each(values, index, NUM: tl.constexpr, STEP: tl.constexpr, OFFSET: tl.constexpr):
    """values[i * STEP + OFFSET] for every i of a tensor, the last for those past the end.

    From Triton 3.9 on the compiler does not see what they are multiples of; tl.multiple_of() tells it.
    """
    chosen = tl.where(index == 0, values[OFFSET], values[(NUM - 1) * STEP + OFFSET])
    for i in tl.static_range(1, NUM - 1):
        chosen = tl.where(index == i, values[i * STEP + OFFSET], chosen)
    return chosen


@triton.jit
def starts_of_row(row, index, sizes, strides, NUM: tl.constexpr, RANK: tl.constexpr):
    """Offsets, in elements, at which one row (int64) starts in each of NUM tensors."""
    rest = row
    start = tl.zeros_like(index).to(tl.int64)
    for i in tl.static_range(RANK - 1):
        start += (rest % sizes[RANK - 2 - i]) * pick_each(strides, index, NUM, RANK, RANK - 1 - i)
        rest = rest // sizes[RANK - 2 - i]
    return start + rest * pick_each(strides, index, NUM, RANK, 0)
