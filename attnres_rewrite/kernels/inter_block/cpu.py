"""Phase 1 by the C++ kernels. A read is phase 1 with one query, and calls them too."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_rewrite.kernels.cpu_library import RowsArgument, address, call, floats, num_chunks, pointers, rows_argument
from attnres_rewrite.kernels.routes import count
from attnres_rewrite.kernels.rows import rows_of


class MixArguments(ctypes.Structure):
    """struct Mix of cpu_kernels.cpp."""

    _fields_ = [
        ("sources", RowsArgument),
        ("probes", ctypes.c_void_p),
        ("rstd", ctypes.c_void_p),
        ("logit", ctypes.c_void_p),
        ("outs", ctypes.POINTER(ctypes.c_void_p)),
        ("lse", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_sources", ctypes.c_int64),
        ("num_queries", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("factors", ctypes.POINTER(ctypes.c_float)),
    ]


class MixBackwardArguments(ctypes.Structure):
    """struct MixBackward of cpu_kernels.cpp."""

    _fields_ = [
        ("sources", RowsArgument),
        ("row_of_grad", ctypes.POINTER(ctypes.c_int64)),
        ("probes", ctypes.c_void_p),
        ("rstd", ctypes.c_void_p),
        ("logit", ctypes.c_void_p),
        ("dlse", ctypes.c_void_p),
        ("dsources", ctypes.POINTER(ctypes.c_void_p)),
        ("parts", ctypes.c_void_p),
        ("dprobes", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_sources", ctypes.c_int64),
        ("num_queries", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("num_chunks", ctypes.c_int64),
        ("factors", ctypes.POINTER(ctypes.c_float)),
    ]


def logits_forward(sources: Sequence[Tensor], probes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return float32 rstd [T, N] and logits [T, N, Q] of N sources [..., D] and float32 probes [Q, D]."""
    rows, (num_queries, width) = rows_of(sources), probes.shape
    rstd = probes.new_empty(rows.num_rows, len(sources))
    logit = probes.new_empty(*rstd.shape, num_queries)
    count("inter_block.logits (C++)")
    sizes = rows.num_rows, len(sources), num_queries, width
    call("mix", sources[0].dtype, MixArguments(
        rows_argument(sources, rows), address(probes), address(rstd), address(logit), None, None, *sizes, eps, None,
    ))  # fmt: skip
    return rstd, logit


def forward(
    sources: Sequence[Tensor], probes: Tensor, eps: float, factors: Sequence[float]
) -> tuple[list[Tensor], Tensor]:
    """Return what mix_forward does, reading the sources once."""
    rows, (num_queries, width) = rows_of(sources), probes.shape
    outs = [torch.empty_like(sources[0], memory_format=torch.contiguous_format) for _ in range(num_queries)]
    rstd = probes.new_empty(rows.num_rows, len(sources))
    logit, lse = probes.new_empty(*rstd.shape, num_queries), probes.new_empty(num_queries, rows.num_rows)
    count("inter_block.forward (C++)")
    sizes = rows.num_rows, len(sources), num_queries, width
    call("mix", sources[0].dtype, MixArguments(
        rows_argument(sources, rows), address(probes), address(rstd), address(logit), pointers(outs), address(lse),
        *sizes, eps, floats(factors),
    ))  # fmt: skip
    return outs, lse


def mix_forward(sources: Sequence[Tensor], logit: Tensor, factors: Sequence[float]) -> tuple[list[Tensor], Tensor]:
    """Return Q mixes times their factors, contiguous [..., D], and float32 lse [Q, T], as triton_forward does."""
    rows, width, num_queries = rows_of(sources), sources[0].shape[-1], logit.shape[-1]
    outs = [torch.empty_like(sources[0], memory_format=torch.contiguous_format) for _ in range(num_queries)]
    lse = logit.new_empty(num_queries, rows.num_rows)
    count("inter_block.forward (C++)")
    sizes = rows.num_rows, len(sources), num_queries, width
    call("mix", sources[0].dtype, MixArguments(
        rows_argument(sources, rows), None, None, address(logit), pointers(outs), address(lse), *sizes, 0.0,
        floats(factors),
    ))  # fmt: skip
    return outs, lse


def inter_block_backward(
    grads: Sequence[Tensor | None],
    dlse: Tensor | None,
    sources: Sequence[Tensor],
    probes: Tensor,
    rstd: Tensor,
    logit: Tensor,
    factors: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of the sources and of the probes; see triton_backward.inter_block_backward."""
    count("inter_block.backward (C++)")
    return mix_backward(grads, dlse, sources, probes, rstd, logit, factors)


def mix_backward(
    grads: Sequence[Tensor | None],
    dlse: Tensor | None,
    sources: Sequence[Tensor],
    probes: Tensor,
    rstd: Tensor,
    logit: Tensor,
    factors: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    """Do it uncounted; without gradients of the mixes, `grads` holds None or nothing."""
    num_queries, width = probes.shape
    given = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads if grad is not None]
    numbers = iter(range(len(sources), len(sources) + len(given)))
    of_query = [next(numbers) if grad is not None else -1 for grad in grads] or [-1] * num_queries
    rows = rows_of([*sources, *given])
    chunks = num_chunks(rows.num_rows, probes)
    dsources = [torch.empty_like(source, memory_format=torch.contiguous_format) for source in sources]
    parts, dprobes = probes.new_empty(chunks, num_queries, width), torch.empty_like(probes)
    dlse = None if dlse is None else dlse.contiguous()
    sizes = rows.num_rows, len(sources), num_queries, width
    call("mix_backward", sources[0].dtype, MixBackwardArguments(
        rows_argument([*sources, *given], rows), (ctypes.c_int64 * num_queries)(*of_query), address(probes),
        address(rstd), address(logit), address(dlse), pointers(dsources), address(parts), address(dprobes), *sizes,
        chunks, floats(factors),
    ))  # fmt: skip
    return dsources, dprobes
