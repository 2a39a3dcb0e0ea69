"""Phase 2 by the C++ kernels, with the add before it and the norm after it."""

import ctypes

import torch
from torch import Tensor

from attnres_rewrite.kernels.cpu_library import KINDS, RowsArgument, address, call, num_chunks, rows_argument
from attnres_rewrite.kernels.routes import count
from attnres_rewrite.kernels.rows import rows_of

NORMS = {"none": 0, "rms": 1, "layer": 2}


class MergeArguments(ctypes.Structure):
    """struct Merge of cpu_kernels.cpp."""

    _fields_ = [
        ("rows", RowsArgument),
        ("update_kind", ctypes.c_int64),
        ("lse", ctypes.c_void_p),
        ("probe", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("norm", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("norm_eps", ctypes.c_float),
        ("factor", ctypes.c_float),
    ]


class MergeBackwardArguments(ctypes.Structure):
    """struct MergeBackward of cpu_kernels.cpp."""

    _fields_ = [
        ("rows", RowsArgument),
        ("has_grad_total", ctypes.c_int64),
        ("lse", ctypes.c_void_p),
        ("probe", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("dtotal", ctypes.c_void_p),
        ("dinter", ctypes.c_void_p),
        ("dlse", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("dvectors", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("norm", ctypes.c_int64),
        ("has_bias", ctypes.c_int64),
        ("num_chunks", ctypes.c_int64),
        ("factor", ctypes.c_float),
    ]


def merge_forward(
    partial: Tensor, update: Tensor | None, inter_out: Tensor, lse: Tensor, probe: Tensor,
    norm_weight: Tensor | None, norm_bias: Tensor | None, norm: str, norm_eps: float, eps: float, factor: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the new partial sum or an empty tensor, the normed mix and stats [T, 4], as triton_forward does."""
    inputs = [partial, inter_out] if update is None else [partial, inter_out, update]
    rows = rows_of(inputs)
    out = torch.empty_like(partial, memory_format=torch.contiguous_format)
    total = partial.new_empty(0) if update is None else torch.empty_like(out)
    stats = probe.new_empty(rows.num_rows, 4)
    lse, weight, bias = lse.contiguous(), _float_vector(norm_weight), _float_vector(norm_bias)
    count("merge.forward (C++)" if norm == "none" else "add_merge_norm.forward (C++)")
    call("merge", partial.dtype, MergeArguments(
        rows_argument(inputs, rows), -1 if update is None else KINDS[update.dtype], address(lse), address(probe),
        address(weight), address(bias), address(total), address(out), address(stats),
        rows.num_rows, partial.shape[-1], NORMS[norm], eps, norm_eps, factor,
    ))  # fmt: skip
    return total, out, stats


def merge_backward(
    grad_total: Tensor | None, grad: Tensor, total: Tensor, inter_out: Tensor, lse: Tensor, probe: Tensor,
    norm_weight: Tensor | None, has_bias: bool, stats: Tensor, norm: str, factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the sum, inter_out, lse and the vectors; see triton_backward.merge_backward."""
    grads = [each if each.stride(-1) == 1 else each.contiguous() for each in (grad, grad_total) if each is not None]
    inputs = [total, inter_out, *grads]
    rows, width = rows_of(inputs), total.shape[-1]
    dtotal, dinter = (torch.empty_like(like, memory_format=torch.contiguous_format) for like in (total, inter_out))
    dlse = torch.empty_like(lse, dtype=torch.float32, memory_format=torch.contiguous_format)
    num_vectors = 1 + (norm_weight is not None) + has_bias
    chunks = num_chunks(rows.num_rows, probe)
    parts, dvectors = probe.new_empty(chunks, num_vectors, width), probe.new_empty(num_vectors, width)
    lse, weight = lse.contiguous(), _float_vector(norm_weight)
    count("merge.backward (C++)" if norm == "none" else "add_merge_norm.backward (C++)")
    call("merge_backward", total.dtype, MergeBackwardArguments(
        rows_argument(inputs, rows), grad_total is not None, address(lse), address(probe), address(weight),
        address(stats), address(dtotal), address(dinter), address(dlse), address(parts), address(dvectors),
        rows.num_rows, width, NORMS[norm], has_bias, chunks, factor,
    ))  # fmt: skip
    return dtotal, dinter, dlse, dvectors


def _float_vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.to(torch.float32).contiguous()
