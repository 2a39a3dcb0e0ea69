"""The backward kernels of phase 1: all source gradients in one pass, the probes' in a fixed order.

With w_qn the softmax weight, g_q the gradient of the mix times the factor of the mix, dlse_q the gradient of lse, and
L_qn = rstd_n * (src_n . probe_q):

    dL_qn   = w_qn * (g_q . src_n - sum_m w_qm * (g_q . src_m) + dlse_q)
    dsrc_n  = sum_q w_qn * g_q + sum_q z_qn * probe_q - c_n * src_n
    dprobe_q = sum over tokens and sources of z_qn * src_n
    where z_qn = dL_qn * rstd_n, c_n = rstd_n / D * sum_q z_qn * L_qn
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnres_rewrite.kernels.inter_block.triton_forward import (
    PRECISIONS,
    added,
    channels,
    padded,
    parts_of,
    resources,
    scalars_dot,
    softmax_of_token,
)
from attnres_rewrite.kernels.routes import count
from attnres_rewrite.kernels.rows import MAX_PROGRAMS, alignment, on_their_device, rows_of
from attnres_rewrite.kernels.triton_rows import pick_each, starts_of_row

# of the partial sums of the probes' gradients
MAX_PARTIAL_BYTES = 64 * 2**20


@triton.jit
def scalars_kernel(
    sources, strides, grads, grad_strides, sizes,  # N and G rows [T, D] of any strides; G is Q or 0
    rstd_TN, logit_TNQ, dlse_QT, factors,  # Q factors of the mixes
    weight_TNQ, z_TNQ, c_TN,
    num_tokens,
    N: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr,
    BN: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One program makes the scalars of one token."""
    t = tl.program_id(0).to(tl.int64)
    n, q = tl.arange(0, BN), tl.arange(0, BQ)
    dots, lost = tl.zeros([BQ, BN], tl.float32), tl.zeros([BQ, BN], tl.float32)
    if G > 0:
        row = tl.multiple_of(pick_each(sources, n, N, 1, 0) + starts_of_row(t, n, sizes, strides, N, RANK), BYTES)
        grad_row = pick_each(grads, q, G, 1, 0) + starts_of_row(t, q, sizes, grad_strides, G, RANK)
        grad_row = tl.multiple_of(grad_row, BYTES)
        for first in tl.range(0, D, BD):
            d = first + tl.arange(0, BD)
            value = tl.load(row[None, :] + d[:, None], (n < N)[None, :] & (d < D)[:, None], 0.0)
            grad = tl.load(grad_row[:, None] + d[None, :], (q < Q)[:, None] & (d < D)[None, :], 0.0)
            # each chunk has a sum of its own, as in logit_kernel: float32 products are summed one by one
            chunk = tl.zeros([BQ, BN], tl.float32)
            chunk = tl.dot(grad, value, chunk, input_precision="ieee", max_num_imprecise_acc=BD)
            dots, lost = added(dots, lost, chunk)
    inside = (n < N)[None, :] & (q < Q)[:, None]
    weight, logit, _, _ = softmax_of_token(logit_TNQ, t, n, q, N, Q)
    factor = pick_each(factors, q, Q, 1, 0)[:, None]
    dots *= factor
    pull = tl.sum(weight * dots, 1)
    dlse = tl.load(dlse_QT + q.to(tl.int64) * num_tokens + t, q < Q, 0.0)
    rstd = tl.load(rstd_TN + t * N + n, n < N, 0.0)
    z = weight * (dots + (dlse - pull)[:, None]) * rstd[None, :]
    c = tl.sum(z * logit, 0) * rstd / D
    here = (t * N + n)[None, :] * Q + q[:, None]
    tl.store(weight_TNQ + here, weight * factor, inside)
    tl.store(z_TNQ + here, z, inside)
    tl.store(c_TN + t * N + n, c, n < N)


@triton.jit
def rows_kernel(
    sources, strides, grads, grad_strides, sizes, probe_KQD,
    weight_TNQ, z_TNQ, c_TN,
    dsources, dprobe_PQD,  # contiguous
    num_tokens, tokens_per_program,
    N: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr,
    BN: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, BYTES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program takes one chunk of channels of consecutive tokens; two parts of the probes are enough here."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    program = tl.program_id(1).to(tl.int64)
    n, q = tl.arange(0, BN), tl.arange(0, BQ)
    inside_n, inside_q = (n < N)[:, None] & (d < D)[None, :], (q < Q)[:, None] & (d < D)[None, :]
    inside = (n < N)[:, None] & (q < Q)[None, :]
    probe_QD = probe_KQD + q[:, None] * D + d[None, :]
    probe = tl.load(probe_QD, inside_q, 0.0)
    probe_rest = tl.load(probe_QD + Q * D, inside_q & (K > 1), 0.0)
    row = pick_each(sources, n, N, 1, 0)
    drow = pick_each(dsources, n, N, 1, 0)
    if G > 0:
        grad_row = pick_each(grads, q, G, 1, 0)
    dprobe = tl.zeros([BQ, BD], tl.float32)
    for t in tl.range(program * tokens_per_program, min((program + 1) * tokens_per_program, num_tokens)):
        start = tl.multiple_of(row + starts_of_row(t, n, sizes, strides, N, RANK), BYTES)
        value = tl.load(start[:, None] + d[None, :], inside_n, 0.0)
        here = (t * N + n)[:, None] * Q + q[None, :]
        z = tl.load(z_TNQ + here, inside, 0.0)
        if value.dtype == tl.bfloat16:
            # the sum over tokens stays float32, so what two parts leave of z counts in it
            rest = z - z.to(tl.bfloat16).to(tl.float32)
            rest -= rest.to(tl.bfloat16).to(tl.float32)
            dprobe += tl.dot(tl.trans(rest.to(tl.bfloat16)), value)
        dprobe += scalars_dot(tl.trans(z), value, tl.zeros([BQ, BD], tl.float32), PRECISION)
        dvalue = -tl.load(c_TN + t * N + n, n < N, 0.0)[:, None] * value.to(tl.float32)
        dvalue = scalars_dot(z, probe, dvalue, PRECISION)
        if K > 1:
            dvalue = scalars_dot(z, probe_rest, dvalue, PRECISION)
        if G > 0:
            start = tl.multiple_of(grad_row + starts_of_row(t, q, sizes, grad_strides, G, RANK), BYTES)
            grad = tl.load(start[:, None] + d[None, :], inside_q, 0.0)
            dvalue = scalars_dot(tl.load(weight_TNQ + here, inside, 0.0), grad, dvalue, PRECISION)
        tl.store(tl.multiple_of(drow + t * D, BYTES)[:, None] + d[None, :], dvalue.to(value.dtype), inside_n)
    tl.store(dprobe_PQD + (program * Q + q[:, None]) * D + d[None, :], dprobe, inside_q)


@on_their_device
def inter_block_backward(
    grads: Sequence[Tensor | None],
    dlse: Tensor | None,
    sources: Sequence[Tensor],
    probes: Tensor,
    rstd: Tensor,
    logit: Tensor,
    factors: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    """Launch both kernels; `rstd` and `logit` are those of logits_forward.

    Args:
        grads: Gradients of the Q mixes [..., D]; None for a mix that nobody used.
        dlse: Gradient of the log-sum-exps, float32 [Q, T], or None.
        sources: N tensors [..., D].
        probes: float32 [Q, D].
        rstd: float32 [T, N].
        logit: float32 [T, N, Q].
        factors: Of the Q mixes.

    Returns:
        The gradients of the sources, contiguous [..., D], and of the probes, float32 [Q, D].
    """
    grads = _rows_like(sources[0], grads)
    rows = rows_of([*sources, *grads])
    num_sources, num_queries, width = len(sources), *probes.shape
    strides, grad_strides = rows.strides[: num_sources * rows.rank], rows.strides[num_sources * rows.rank :]
    dlse = logit.new_zeros(num_queries, rows.num_rows) if dlse is None else dlse.contiguous()
    dsources = [torch.empty(source.shape, dtype=source.dtype, device=source.device) for source in sources]
    tokens_per_program = triton.cdiv(
        rows.num_rows, max(1, min(MAX_PROGRAMS, MAX_PARTIAL_BYTES // (4 * probes.numel())))
    )
    num_programs = triton.cdiv(rows.num_rows, tokens_per_program) if rows.num_rows else 0
    dprobe = probes.new_empty(num_programs, num_queries, width)
    if num_programs:
        count("inter_block.backward")
        BN, BQ = padded(num_sources), padded(num_queries)
        shared = {
            "N": num_sources, "Q": num_queries, "G": len(grads), "D": width, "RANK": rows.rank,
            "BN": BN, "BQ": BQ, "BD": channels(sources[0].dtype, 256, 2 * max(BN, BQ)), **resources(max(BN, BQ)),
            "BYTES": alignment(sources, grads, dsources),
        }  # fmt: skip
        tensors = (tuple(sources), strides, tuple(grads), grad_strides, rows.sizes)
        weight, z, c = torch.empty_like(logit), torch.empty_like(logit), torch.empty_like(rstd)
        scalars_kernel[(rows.num_rows,)](
            *tensors, rstd, logit, dlse, tuple(factors), weight, z, c, rows.num_rows, **shared
        )
        parts = parts_of(probes, sources[0].dtype)
        rows_kernel[(triton.cdiv(width, shared["BD"]), num_programs)](
            *tensors, parts, weight, z, c, tuple(dsources), dprobe, rows.num_rows, tokens_per_program,
            K=len(parts), PRECISION=PRECISIONS[sources[0].dtype], **shared,
        )  # fmt: skip
    return dsources, dprobe.sum(0)


def _rows_like(like: Tensor, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Return gradients with contiguous channels, one row of zeros for all tokens in place of None; [] if all are."""
    if all(grad is None for grad in grads):
        return []
    zeros = like.new_zeros(like.shape[-1]).expand(like.shape)
    given = [zeros if grad is None else grad for grad in grads]
    return [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in given]
