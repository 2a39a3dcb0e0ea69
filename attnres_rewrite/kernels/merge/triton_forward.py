"""The forward kernel of phase 2: add, merge and normalise in one read of every row.

p and o are the rows of the new partial sum and of inter_out; scalars are kept for the backward as stats [T, 4].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnres_rewrite.kernels.routes import count
from attnres_rewrite.kernels.rows import on_their_device, rows_of, whole_rows
from attnres_rewrite.kernels.triton_rows import row_starts


@triton.jit
def merge_forward_kernel(
    partial, inter_out, update, strides, sizes,  # NUM rows [T, D] of any strides; update may be None
    lse_T, probe_D, weight_D, bias_D,  # weight and bias may be None
    total_TD, out_TD, stats_T4,  # contiguous
    num_tokens, eps, norm_eps, factor,
    NORM: tl.constexpr, NUM: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program takes BT tokens."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.arange(0, BD)
    here = t < num_tokens
    inside = here[:, None] & (d < D)[None, :]
    out_rows = t[:, None] * D + d[None, :]
    p_rows = row_starts(t, 0, sizes, strides, NUM, RANK)[:, None] + d[None, :]
    o_rows = row_starts(t, 1, sizes, strides, NUM, RANK)[:, None] + d[None, :]
    p = tl.load(partial + p_rows, inside, 0.0).to(tl.float32)
    o = tl.load(inter_out + o_rows, inside, 0.0).to(tl.float32)
    if update is not None:
        update_rows = row_starts(t, 2, sizes, strides, NUM, RANK)[:, None] + d[None, :]
        added = p + tl.load(update + update_rows, inside, 0.0).to(tl.float32)
        # the merge takes the sum as later reads will find it
        rounded = added.to(total_TD.dtype.element_ty)
        tl.store(total_TD + out_rows, rounded, inside)
        p = rounded.to(tl.float32)

    rstd = tl.rsqrt(tl.sum(p * p, 1) / D + eps)
    logit = tl.sum(p * tl.load(probe_D + d, d < D, 0.0)[None, :], 1) * rstd
    lse = tl.load(lse_T + t, here, 0.0)
    # 1 - share would lose a rest that is small
    share, rest = tl.sigmoid(logit - lse), tl.sigmoid(lse - logit)
    mix = (factor * rest)[:, None] * o + (factor * share)[:, None] * p
    tl.store(stats_T4 + 4 * t, rstd, here)
    tl.store(stats_T4 + 4 * t + 1, logit, here)

    norm_rstd, mean = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    if NORM == "layer":
        mean = tl.sum(mix, 1) / D
        mix = tl.where(inside, mix - mean[:, None], 0.0)
    if NORM != "none":
        norm_rstd = tl.rsqrt(tl.sum(mix * mix, 1) / D + norm_eps)
        mix = mix * norm_rstd[:, None]
    tl.store(stats_T4 + 4 * t + 2, norm_rstd, here)
    tl.store(stats_T4 + 4 * t + 3, mean, here)
    if weight_D is not None:
        mix *= tl.load(weight_D + d, d < D, 0.0).to(tl.float32)[None, :]
    if bias_D is not None:
        mix += tl.load(bias_D + d, d < D, 0.0).to(tl.float32)[None, :]
    tl.store(out_TD + out_rows, mix.to(out_TD.dtype.element_ty), inside)


@on_their_device
def merge_forward(
    partial: Tensor, update: Tensor | None, inter_out: Tensor, lse: Tensor, probe: Tensor,
    norm_weight: Tensor | None, norm_bias: Tensor | None, norm: str, norm_eps: float, eps: float, factor: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernel on rows [..., D], a float32 lse [...] and a float32 probe [D]; norm "none", "rms" or "layer".

    Returns:
        The new partial sum [..., D], or an empty tensor without an update; the mix times `factor`, normed [..., D];
        float32 [T, 4]: rstd of the partial sum, its logit, and of the norm rstd and mean, zero where it has none.
    """
    inputs = [partial, inter_out] if update is None else [partial, inter_out, update]
    rows, width = rows_of(inputs), partial.shape[-1]
    tile = whole_rows(width)
    out = torch.empty(partial.shape, dtype=partial.dtype, device=partial.device)
    total = partial.new_empty(0) if update is None else torch.empty_like(out)
    stats = probe.new_empty(rows.num_rows, 4)
    if rows.num_rows:
        count("merge.forward" if norm == "none" else "add_merge_norm.forward")
        merge_forward_kernel[(triton.cdiv(rows.num_rows, tile.BT),)](
            partial, inter_out, update, rows.strides, rows.sizes, lse.contiguous(), probe, norm_weight, norm_bias,
            total, out, stats, rows.num_rows, eps, norm_eps, factor,
            NORM=norm, NUM=len(inputs), D=width, RANK=rows.rank, BT=tile.BT, BD=tile.BD, num_warps=tile.num_warps,
        )  # fmt: skip
    return total, out, stats
