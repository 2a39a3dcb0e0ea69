"""The backward kernel of phase 2: it makes the mix again from inter_out and the new partial sum.

p is the new partial sum, o inter_out, share and rest the sigmoids of the forward, G the gradient of the output:

    mix    = factor * (rest * o + share * p)
    y      = (mix - mean) * norm_rstd                                   mean is 0 in an RMSNorm
    g      = norm_rstd * (G * weight - mean(G * weight) - y * mean(G * weight * y)),  or G without a norm
    slope  = g . (p - o)
    dlogit = factor * share * rest * slope
    dlse   = -dlogit
    do     = factor * rest * g
    dp     = factor * share * g + dlogit * rstd * (probe - p * rstd * logit / D) + gradient of the new partial sum
    dprobe = sum over tokens of dlogit * rstd * p
    dweight, dbias = sums over tokens of G * y and of G

mean(G * weight) is left out in an RMSNorm. dp is the gradient of the old partial sum and of the update.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnres_rewrite.kernels.routes import count
from attnres_rewrite.kernels.rows import MAX_PROGRAMS, on_their_device, rows_of, whole_rows
from attnres_rewrite.kernels.triton_rows import row_starts


@triton.jit
def tile_of(index, t, d, sizes, strides, RANK: tl.constexpr):
    """Offsets [BT, BD] of channels d of rows t of tensor `index` of two."""
    return row_starts(t, index, sizes, strides, 2, RANK)[:, None] + d[None, :]


@triton.jit
def normalised(p, o, share, rest, stats_T4, t, num_tokens, NORM: tl.constexpr):
    """Make the normalised mix [BT, BD] again; `share` and `rest` hold the factor. Also return the rstd of the norm."""
    here = t < num_tokens
    norm_rstd = tl.load(stats_T4 + 4 * t + 2, here, 0.0)
    mix = rest[:, None] * o + share[:, None] * p
    if NORM == "layer":
        mix -= tl.load(stats_T4 + 4 * t + 3, here, 0.0)[:, None]
    return mix * norm_rstd[:, None], norm_rstd


@triton.jit
def through_norm(g, y, between, norm_rstd, D: tl.constexpr, NORM: tl.constexpr):
    """Turn the gradient of the normalised mix y into that of the mix, and return its dot product with `between` too.

    The product is made of sums with g, not with the result: the rows of `between` are done with early.
    """
    pull = tl.sum(g * y, 1) / D
    slope = tl.sum(g * between, 1) - pull * tl.sum(y * between, 1)
    dmix = g - pull[:, None] * y
    if NORM == "layer":
        mean = tl.sum(g, 1) / D
        slope -= mean * tl.sum(between, 1)
        dmix -= mean[:, None]
    return dmix * norm_rstd[:, None], slope * norm_rstd


@triton.jit
def merge_backward_kernel(
    total, inter_out, strides, sizes,  # two rows [T, D] of any strides
    grad_total_TD, grad_TD, lse_T, stats_T4, probe_D, weight_D,  # contiguous; grad_total and weight may be None
    dtotal_TD, dinter_TD, dlse_T, dvectors_PKD,
    num_tokens, tiles_per_program, factor,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, K: tl.constexpr, RELOAD: tl.constexpr,
    D: tl.constexpr, RANK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program takes consecutive tiles of BT tokens and keeps its sums over them in registers."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    dprobe, dweight, dbias = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    for tile in tl.range(0, tiles_per_program):
        t = (program * tiles_per_program + tile) * BT + tl.arange(0, BT)
        here = t < num_tokens
        inside = here[:, None] & (d < D)[None, :]
        rows = t[:, None] * D + d[None, :]
        p = tl.load(total + tile_of(0, t, d, sizes, strides, RANK), inside, 0.0).to(tl.float32)
        o = tl.load(inter_out + tile_of(1, t, d, sizes, strides, RANK), inside, 0.0).to(tl.float32)
        g = tl.load(grad_TD + rows, inside, 0.0).to(tl.float32)
        lse = tl.load(lse_T + t, here, 0.0)
        rstd, logit = tl.load(stats_T4 + 4 * t, here, 0.0), tl.load(stats_T4 + 4 * t + 1, here, 0.0)
        share, rest = factor * tl.sigmoid(logit - lse), factor * tl.sigmoid(lse - logit)
        if HAS_BIAS:
            dbias += tl.sum(g, 0)
        if NORM == "none":
            slope = tl.sum(g * (p - o), 1)
        else:
            y, norm_rstd = normalised(p, o, share, rest, stats_T4, t, num_tokens, NORM)
            if weight_D is not None:
                dweight += tl.sum(g * y, 0)
                g *= tl.load(weight_D + d, d < D, 0.0).to(tl.float32)[None, :]
            g, slope = through_norm(g, y, p - o, norm_rstd, D, NORM)

        dlogit = share * tl.sigmoid(lse - logit) * slope
        tl.store(dlse_T + t, -dlogit, here)
        tl.store(dinter_TD + rows, (rest[:, None] * g).to(dinter_TD.dtype.element_ty), inside)
        if RELOAD:
            # wide rows do not fit into the registers: p comes once more, from the cache; volatile keeps the two apart
            p = tl.load(total + tile_of(0, t, d, sizes, strides, RANK), inside, 0.0, volatile=True).to(tl.float32)
        dscaled = (dlogit * rstd)[:, None]
        dprobe += tl.sum(dscaled * p, 0)
        probe = tl.load(probe_D + d, d < D, 0.0)[None, :]
        dp = share[:, None] * g + dscaled * (probe - p * (rstd * logit / D)[:, None])
        if grad_total_TD is not None:
            dp += tl.load(grad_total_TD + rows, inside, 0.0).to(tl.float32)
        tl.store(dtotal_TD + rows, dp.to(dtotal_TD.dtype.element_ty), inside)

    dvectors = dvectors_PKD + program * K * D + d
    tl.store(dvectors, dprobe, d < D)
    if weight_D is not None:
        tl.store(dvectors + D, dweight, d < D)
    if HAS_BIAS:
        tl.store(dvectors + (K - 1) * D, dbias, d < D)


@on_their_device
def merge_backward(
    grad_total: Tensor | None, grad: Tensor, total: Tensor, inter_out: Tensor, lse: Tensor, probe: Tensor,
    norm_weight: Tensor | None, has_bias: bool, stats: Tensor, norm: str, factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernel; `stats` are those of merge_forward, the gradients are those of its outputs [..., D].

    Returns:
        The gradients of the new partial sum and of inter_out, contiguous [..., D]; of lse, float32 [...]; and of the
        probe, the weight if there is one and the bias if there is one, float32 [K, D].
    """
    rows, width = rows_of([total, inter_out]), total.shape[-1]
    tile = whole_rows(width)
    # 8192 channels take all registers of a processor: three sums fit into 255 of eight warps, not into 128 of sixteen
    num_warps = 8 if tile.BD == 8192 else tile.num_warps
    num_tiles = triton.cdiv(rows.num_rows, tile.BT)
    tiles_per_program = triton.cdiv(num_tiles, MAX_PROGRAMS)
    num_programs = triton.cdiv(num_tiles, tiles_per_program) if num_tiles else 0
    # there is no room for the sum of a bias then, and its gradient is a plain sum: one more reading of the gradient
    bias_apart = has_bias and tile.BD >= 8192
    has_bias = has_bias and not bias_apart
    num_vectors = 1 + (norm_weight is not None) + has_bias
    dtotal, dinter = (torch.empty(like.shape, dtype=like.dtype, device=like.device) for like in (total, inter_out))
    dlse = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    dvectors = probe.new_empty(num_programs, num_vectors, width)
    if num_programs:
        count("merge.backward" if norm == "none" else "add_merge_norm.backward")
        merge_backward_kernel[(num_programs,)](
            total, inter_out, rows.strides, rows.sizes,
            None if grad_total is None else grad_total.contiguous(), grad.contiguous(), lse.contiguous(), stats, probe,
            norm_weight, dtotal, dinter, dlse, dvectors, rows.num_rows, tiles_per_program, factor,
            NORM=norm, HAS_BIAS=has_bias, K=num_vectors, RELOAD=tile.BD >= 8192 and norm != "none",
            D=width, RANK=rows.rank, BT=tile.BT, BD=tile.BD, num_warps=num_warps,
        )  # fmt: skip
    sums = dvectors.sum(0)
    if bias_apart:
        sums = torch.cat([sums, grad.reshape(-1, width).sum(0, keepdim=True, dtype=torch.float32)])
    return dtotal, dinter, dlse, sums
