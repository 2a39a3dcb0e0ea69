"""The backward kernel of a read: all source gradients in one launch, and the probe's in a fixed order.

With w_s the softmax weight, g the gradient of the mix times `factor`, and L_s = rstd_s * (src_s . probe):

    dL_s   = w_s * (g . src_s - sum_r w_r * (g . src_r))
    dsrc_s = w_s * g + dL_s * rstd_s * (probe - src_s * rstd_s * L_s / D)
    dprobe = sum over tokens and sources of dL_s * rstd_s * src_s
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnres_rewrite.kernels.routes import count
from attnres_rewrite.kernels.rows import MAX_PROGRAMS, on_their_device, rows_of, whole_rows
from attnres_rewrite.kernels.triton_rows import pick, row_starts


@triton.jit
def read_backward_kernel(
    sources, strides, sizes, probe_D,  # S rows [T, D] of any strides
    grad_TD, rstd_TS, logit_TS,
    dsources, dprobe_PD,  # contiguous
    num_tokens, tiles_per_program, factor,
    S: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program takes consecutive tiles of BT tokens; the second pass finds the sources in the cache."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    probe = tl.load(probe_D + d, d < D, 0.0)[None, :]
    dprobe = tl.zeros([BD], tl.float32)
    for tile in tl.range(0, tiles_per_program):
        t = (program * tiles_per_program + tile) * BT + tl.arange(0, BT)
        here = t < num_tokens
        inside = here[:, None] & (d < D)[None, :]
        grad = tl.load(grad_TD + t[:, None] * D + d[None, :], inside, 0.0).to(tl.float32) * factor
        # exp(logit - lse) would round where logits are large
        top = tl.full([BT], float("-inf"), tl.float32)
        total = tl.zeros([BT], tl.float32)
        for s in tl.range(0, S):
            logit = tl.load(logit_TS + t * S + s, here, 0.0)
            new_top = tl.maximum(top, logit)
            total = total * tl.exp(top - new_top) + tl.exp(logit - new_top)
            top = new_top

        pull = tl.zeros([BT], tl.float32)
        for s in tl.range(0, S):
            start = row_starts(t, s, sizes, strides, S, RANK)
            value = tl.load(pick(sources, s, S, 1, 0) + start[:, None] + d[None, :], inside, 0.0).to(tl.float32)
            weight = tl.exp(tl.load(logit_TS + t * S + s, here, 0.0) - top) / total
            pull += weight * tl.sum(grad * value, 1)

        for s in tl.range(0, S):
            start = row_starts(t, s, sizes, strides, S, RANK)
            value = tl.load(pick(sources, s, S, 1, 0) + start[:, None] + d[None, :], inside, 0.0).to(tl.float32)
            rstd = tl.load(rstd_TS + t * S + s, here, 0.0)
            logit = tl.load(logit_TS + t * S + s, here, 0.0)
            weight = tl.exp(logit - top) / total
            dscaled = weight * (tl.sum(grad * value, 1) - pull) * rstd
            dprobe += tl.sum(tl.where(here[:, None], dscaled[:, None] * value, 0.0), 0)
            dvalue = weight[:, None] * grad + dscaled[:, None] * (probe - value * (rstd * logit / D)[:, None])
            dsource = pick(dsources, s, S, 1, 0)
            tl.store(dsource + t[:, None] * D + d[None, :], dvalue.to(dsource.dtype.element_ty), inside)
    tl.store(dprobe_PD + program * D + d, dprobe, d < D)


@on_their_device
def read_backward(
    grad: Tensor, sources: Sequence[Tensor], probe: Tensor, rstd: Tensor, logit: Tensor, factor: float
) -> tuple[list[Tensor], Tensor]:
    """Launch the kernel; `rstd` and `logit` are those of read_forward, `grad` [..., D].

    Returns:
        The gradients of the sources, contiguous [..., D], and of the probe, float32 [D].
    """
    rows, width = rows_of(sources), sources[0].shape[-1]
    tile = whole_rows(width)
    num_tiles = triton.cdiv(rows.num_rows, tile.BT)
    tiles_per_program = triton.cdiv(num_tiles, MAX_PROGRAMS)
    num_programs = triton.cdiv(num_tiles, tiles_per_program) if num_tiles else 0
    dsources = [torch.empty(source.shape, dtype=source.dtype, device=source.device) for source in sources]
    dprobe = probe.new_empty(num_programs, width)
    if num_programs:
        count("read.backward")
        read_backward_kernel[(num_programs,)](
            tuple(sources), rows.strides, rows.sizes, probe, grad.contiguous(), rstd, logit,
            tuple(dsources), dprobe, rows.num_rows, tiles_per_program, factor,
            S=len(sources), D=width, RANK=rows.rank, BT=tile.BT, BD=tile.BD, num_warps=tile.num_warps,
        )  # fmt: skip
    return dsources, dprobe.sum(0)
