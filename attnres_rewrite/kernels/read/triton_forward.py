"""The forward kernel of a read: every source row is read once, the mix is written once."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnres_rewrite.kernels.routes import count
from attnres_rewrite.kernels.rows import on_their_device, rows_of, whole_rows
from attnres_rewrite.kernels.triton_rows import pick, row_starts


@triton.jit
def read_forward_kernel(
    sources, strides, sizes, probe_D,  # S rows [T, D] of any strides
    out_TD, rstd_TS, logit_TS,  # contiguous
    num_tokens, eps, factor,
    S: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program mixes BT tokens by online softmax."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.arange(0, BD)
    here = t < num_tokens
    inside = here[:, None] & (d < D)[None, :]
    probe = tl.load(probe_D + d, d < D, 0.0)

    top = tl.full([BT], float("-inf"), tl.float32)
    total = tl.zeros([BT], tl.float32)
    mixed = tl.zeros([BT, BD], tl.float32)
    for s in tl.range(0, S):
        start = row_starts(t, s, sizes, strides, S, RANK)
        value = tl.load(pick(sources, s, S, 1, 0) + start[:, None] + d[None, :], inside, 0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
        logit = tl.sum(value * probe[None, :], 1) * rstd
        new_top = tl.maximum(top, logit, propagate_nan=tl.PropagateNan.ALL)
        shrink, weight = tl.exp(top - new_top), tl.exp(logit - new_top)
        total = total * shrink + weight
        mixed = mixed * shrink[:, None] + weight[:, None] * value
        top = new_top
        tl.store(rstd_TS + t * S + s, rstd, here)
        tl.store(logit_TS + t * S + s, logit, here)
    mixed = mixed * (factor / total)[:, None]
    tl.store(out_TD + t[:, None] * D + d[None, :], mixed.to(out_TD.dtype.element_ty), inside)


@on_their_device
def read_forward(sources: Sequence[Tensor], probe: Tensor, eps: float, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel on S sources [..., D] and a float32 probe [D].

    Returns:
        The mix times `factor` [..., D]; float32 rstd [T, S] and logits [T, S] for the backward.
    """
    rows, width = rows_of(sources), sources[0].shape[-1]
    tile = whole_rows(width)
    out = torch.empty(sources[0].shape, dtype=sources[0].dtype, device=probe.device)
    rstd, logit = (probe.new_empty(rows.num_rows, len(sources)) for _ in range(2))
    if rows.num_rows:
        count("read.forward")
        read_forward_kernel[(triton.cdiv(rows.num_rows, tile.BT),)](
            tuple(sources), rows.strides, rows.sizes, probe, out, rstd, logit, rows.num_rows, eps, factor,
            S=len(sources), D=width, RANK=rows.rank, BT=tile.BT, BD=tile.BD, num_warps=tile.num_warps,
        )  # fmt: skip
    return out, rstd, logit
