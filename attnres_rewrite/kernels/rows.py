"""Address the rows of several tensors [..., D] as rows of one [T, D], whatever their leading strides.

Leading dimensions that are regular in every tensor are merged, so contiguous tensors have one. Kernels find the rows
with triton_rows.row_starts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# A fixed number on every device: programs that sum over tokens give the same bits everywhere.
MAX_PROGRAMS = 512


@dataclass(frozen=True, slots=True)
class Rows:
    """Where row t of each tensor starts.

    sizes: of the merged leading dimensions but the first, the innermost last.
    strides: for each tensor, its stride in each merged leading dimension, in elements.
    """

    num_rows: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.sizes) + 1


def rows_of(tensors: Sequence[Tensor]) -> Rows:
    """Merge the leading dimensions of tensors of one shape; the last dimension of each is contiguous."""
    shape = tensors[0].shape[:-1]
    num_rows = shape.numel()
    kept: list[int] = []  # sizes, innermost first
    steps: list[list[int]] = [[] for _ in tensors]
    for dim in reversed(range(len(shape))):
        if shape[dim] == 1 and len(shape) > 1:
            continue
        strides = [tensor.stride(dim) for tensor in tensors]
        if kept and all(stride == step[-1] * kept[-1] for stride, step in zip(strides, steps, strict=True)):
            kept[-1] *= shape[dim]
            continue
        kept.append(shape[dim])
        for stride, step in zip(strides, steps, strict=True):
            step.append(stride)
    if not kept:
        kept, steps = [1], [[0] for _ in tensors]
    flat = tuple(stride for step in steps for stride in reversed(step))
    return Rows(num_rows, tuple(reversed(kept[:-1])), flat)


def alignment(*groups: Sequence[Tensor]) -> int:
    """Return the power of two of bytes, at most the 16 that one load takes, at which all rows of all tensors start."""
    bits = 16
    for tensor in chain.from_iterable(groups):
        bits |= tensor.data_ptr()
        for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False):
            bits |= stride * tensor.itemsize if size > 1 else 0
    return bits & -bits


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of the work of one program: BT whole rows of D, padded to BD channels."""

    BT: int
    BD: int
    num_warps: int


def whole_rows(width: int, elements: int = 2048) -> Tile:
    """Choose a tile of whole rows that holds about `elements` values, or one row."""
    padded = 1 << (max(width, 16) - 1).bit_length()
    tokens = max(1, elements // padded)
    return Tile(tokens, padded, num_warps=min(16, max(4, padded // 512)))


def on_their_device(launch: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make the device of its tensors the current one for a launch: Triton launches on that, whatever it gets."""

    @wraps(launch)
    def launched(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.cuda.device_of(next(value for value in args if isinstance(value, Tensor))):
            return launch(*args, **kwargs)

    return launched
