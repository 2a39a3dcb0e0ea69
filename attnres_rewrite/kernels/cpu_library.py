"""Compile cpu_kernels.cpp with the compiler and the flags that Inductor found for this machine, and call it.

Inductor's cache keeps the libraries, one for each dtype of rows: a second process loads what the first compiled.
"""

import contextvars
import ctypes
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnres_rewrite.kernels.rows import Rows

SCALARS = {torch.float32: "float", torch.bfloat16: "c10::BFloat16", torch.float16: "c10::Half"}
KINDS = {dtype: kind for kind, dtype in enumerate(SCALARS)}
# of the partial sums of one gradient
MAX_CHUNKS = 64
MAX_PARTIAL_BYTES = 64 * 2**20
# of one tensor; a thread with less is waited for longer than it saves
ELEMENTS_OF_A_THREAD = 2048


class RowsArgument(ctypes.Structure):
    """struct Rows of cpu_kernels.cpp."""

    _fields_ = [
        ("tensors", ctypes.POINTER(ctypes.c_void_p)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int64),
    ]


def rows_argument(tensors: Sequence[Tensor], rows: Rows) -> RowsArgument:
    """Say where the rows of these tensors start, which must be those that `rows_of` was given."""
    strides = (ctypes.c_int64 * len(rows.strides))(*rows.strides)
    sizes = (ctypes.c_int64 * len(rows.sizes))(*rows.sizes)
    return RowsArgument(pointers(tensors), strides, sizes, rows.rank)


def pointers(tensors: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    """Return where the tensors lie, as void**."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor lies, or None for none."""
    return None if tensor is None else tensor.data_ptr()


def floats(values: Sequence[float]) -> "ctypes.Array[ctypes.c_float]":
    """Return numbers as float*."""
    return (ctypes.c_float * len(values))(*values)


def num_chunks(num_tokens: int, partial: Tensor) -> int:
    """Choose how many sums over tokens, each like `partial` in float32, a gradient is made of: never by the threads."""
    return min(num_tokens, MAX_CHUNKS, max(1, MAX_PARTIAL_BYTES // (4 * partial.numel())))


def num_threads(num_tokens: int, width: int) -> int:
    """Choose how many of torch's threads share so many rows: one where a token is decoded."""
    return max(1, min(torch.get_num_threads(), num_tokens, num_tokens * width // ELEMENTS_OF_A_THREAD))


def call(name: str, dtype: torch.dtype, arguments: Any) -> None:
    """Run one kernel on rows of a dtype.

    Raises:
        TypeError: There is none for this dtype.
    """
    if dtype not in SCALARS:
        raise TypeError(
            f"the compiled graph has a kernel that takes no {dtype}: torch 2.11 does not compile anew when a model is "
            "moved to another dtype. Call torch.compiler.reset() after the move"
        )
    kernel = getattr(library(dtype).result(), f"attnres_{name}")
    # said outright: a library of the compiler's own OpenMP does not know what torch was told
    kernel(ctypes.byref(arguments), ctypes.c_int(num_threads(arguments.num_tokens, arguments.width)))


@cache
def library(dtype: torch.dtype) -> "Future[Any]":
    """Compile the kernels for rows of a dtype, in a thread: whoever traces a graph with them goes on meanwhile."""
    # torch's settings, such as torch._inductor.config.cpp.cxx, are those of the caller
    return _compiler.submit(contextvars.copy_context().run, _load, dtype)


_compiler = ThreadPoolExecutor(1, thread_name_prefix="attnres-cpu-kernels")


def _load(dtype: torch.dtype) -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache

    source = Path(__file__).with_name("cpu_kernels.cpp").read_text()
    return CppCodeCache.load(f"#define ATTNRES_SCALAR {SCALARS[dtype]}\n{source}")


def prepare(dtype: torch.dtype) -> bool:
    """Start to compile the kernels for rows of a dtype, and say so; without a C++ compiler there are none."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    library(dtype)
    return True


# what torch.compiler.assume_constant_result does, and would import all of Dynamo for
prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]
