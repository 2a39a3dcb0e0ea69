"""The forward kernels of phase 1: the logits of every source, then all mixes of a token.

Sums over channels or sources are matrix products for the tensor cores: with Q = 24 queries the plain multiply-adds
would take longer than the memory. Values of sources enter as they are. A float32 factor is split where they are
bfloat16, "tf32x3" where they are float16, so that products keep float32's precision.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnres_rewrite.kernels.routes import count
from attnres_rewrite.kernels.rows import MAX_PROGRAMS, alignment, on_their_device, rows_of
from attnres_rewrite.kernels.triton_rows import pick, pick_each, row_starts, starts_of_row

PRECISIONS = {torch.float32: "ieee", torch.float16: "tf32x3", torch.bfloat16: "ieee"}


@triton.jit
def scalars_dot(scalars, rows, acc, PRECISION: tl.constexpr):
    """acc + scalars @ rows, for float32 scalars; where rows are bfloat16, two parts hold 16 of their 24 bits."""
    if rows.dtype == tl.bfloat16:
        high = scalars.to(tl.bfloat16)
        acc = tl.dot((scalars - high.to(tl.float32)).to(tl.bfloat16), rows, acc)
        return tl.dot(high, rows, acc)
    return tl.dot(scalars, rows.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def added(total, lost, part):
    """total + part, and what it lost, by Kahan: a hundred sums in a row would round twice as much as the reference."""
    part -= lost
    new_total = total + part
    return new_total, (new_total - total) - part


@triton.jit
def softmax_of_token(logit_TNQ, t, n, q, N: tl.constexpr, Q: tl.constexpr):
    """[Q, N] weights and logits of one token, [Q] maxima and sums of exp(logit - top); exp(logit - lse) would round."""
    inside = (n < N)[None, :] & (q < Q)[:, None]
    logit = tl.load(logit_TNQ + (t * N + n)[None, :] * Q + q[:, None], inside, 0.0)
    masked = tl.where((n < N)[None, :], logit, float("-inf"))
    top = tl.max(masked, 1)
    raw = tl.exp(masked - top[:, None])
    total = tl.sum(raw, 1)
    return raw / total[:, None], logit, top, total


@triton.jit
def logit_kernel(
    sources, strides, sizes, probe_KQD,  # N rows [T, D] of any strides; K parts that sum up to the probes
    rstd_TN, logit_TNQ,  # contiguous
    num_tokens, eps,
    N: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program takes BT tokens of one source."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    n = tl.program_id(1)
    q = tl.arange(0, BQ)
    here = t < num_tokens
    row = pick(sources, n, N, 1, 0) + row_starts(t, n, sizes, strides, N, RANK)
    dots, lost = tl.zeros([BT, BQ], tl.float32), tl.zeros([BT, BQ], tl.float32)
    squares = tl.zeros([BT, BD], tl.float32)
    for first in tl.range(0, D, BD):
        d = first + tl.arange(0, BD)
        value = tl.load(row[:, None] + d[None, :], here[:, None] & (d < D)[None, :], 0.0)
        squares += value.to(tl.float32) * value.to(tl.float32)
        # tensor cores truncate as they accumulate: each chunk has a sum of its own, its smallest parts first; the last
        # argument of the product keeps the compiler from carrying one sum through all chunks
        chunk = tl.zeros([BT, BQ], tl.float32)
        for k in tl.static_range(K):
            part = probe_KQD + (K - 1 - k) * Q * D
            probe = tl.load(part + q[None, :] * D + d[:, None], (q < Q)[None, :] & (d < D)[:, None], 0.0)
            chunk = tl.dot(value.to(probe.dtype), probe, chunk, PRECISION, max_num_imprecise_acc=BD)
        dots, lost = added(dots, lost, chunk)
    rstd = tl.rsqrt(tl.sum(squares, 1) / D + eps)
    row_TN = t * N + n
    tl.store(rstd_TN + row_TN, rstd, here)
    tl.store(logit_TNQ + row_TN[:, None] * Q + q[None, :], dots * rstd[:, None], here[:, None] & (q < Q)[None, :])


@triton.jit
def mix_kernel(
    sources, strides, sizes, logit_TNQ, factors,  # Q factors of the mixes
    outs, lse_QT,  # contiguous
    num_tokens, chunks_per_program,
    N: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr,
    BN: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, BYTES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program mixes some chunks of channels of one token: [Q, N] weights times [N, BD] values."""
    t = tl.program_id(0).to(tl.int64)
    n, q = tl.arange(0, BN), tl.arange(0, BQ)
    weight, _, top, total = softmax_of_token(logit_TNQ, t, n, q, N, Q)
    if tl.program_id(1) == 0:
        tl.store(lse_QT + q.to(tl.int64) * num_tokens + t, top + tl.log(total), q < Q)
    weight *= pick_each(factors, q, Q, 1, 0)[:, None]
    row = tl.multiple_of(pick_each(sources, n, N, 1, 0) + starts_of_row(t, n, sizes, strides, N, RANK), BYTES)
    out = tl.multiple_of(pick_each(outs, q, Q, 1, 0) + t * D, BYTES)
    for chunk in tl.range(0, chunks_per_program):
        d = (tl.program_id(1) * chunks_per_program + chunk) * BD + tl.arange(0, BD)
        value = tl.load(row[:, None] + d[None, :], (n < N)[:, None] & (d < D)[None, :], 0.0)
        mixed = scalars_dot(weight, value, tl.zeros([BQ, BD], tl.float32), PRECISION)
        tl.store(out[:, None] + d[None, :], mixed.to(value.dtype), (q < Q)[:, None] & (d < D)[None, :])


def parts_of(probes: Tensor, dtype: torch.dtype) -> Tensor:
    """Split probes [Q, D] for products with sources of a dtype: [K, Q, D], the largest part first."""
    if dtype != torch.bfloat16:
        return probes.unsqueeze(0)
    parts: list[Tensor] = []
    for _ in range(3):
        parts.append(probes.to(dtype))
        probes = probes - parts[-1]
    return torch.stack(parts)


def padded(count: int) -> int:
    """Round up to a dimension of a matrix product."""
    return 1 << (max(count, 16) - 1).bit_length()


def channels(dtype: torch.dtype, num_bytes: int, largest: int) -> int:
    """Choose the channels of a chunk: so many bytes, or fewer where the other dimension of a tile is large."""
    return max(16, min(num_bytes // dtype.itemsize, 8192 // largest))


def resources(largest: int) -> dict[str, int]:
    """Choose warps and stages by the largest dimension of a product: many sources fill registers and shared memory."""
    return {"num_warps": max(4, min(16, largest // 8)), "num_stages": 3 if largest <= 32 else 1}


@on_their_device
def logits_forward(sources: Sequence[Tensor], probes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch the first kernel on N sources [..., D] and float32 probes [Q, D].

    Returns:
        float32 rstd [T, N] and logits [T, N, Q].
    """
    rows, (num_queries, width) = rows_of(sources), probes.shape
    parts = parts_of(probes, sources[0].dtype)
    rstd = probes.new_empty(rows.num_rows, len(sources))
    logit = probes.new_empty(*rstd.shape, num_queries)
    BT, BQ = 64, padded(num_queries)
    if rows.num_rows:
        count("inter_block.logits")
        logit_kernel[(triton.cdiv(rows.num_rows, BT), len(sources))](
            tuple(sources), rows.strides, rows.sizes, parts, rstd, logit, rows.num_rows, eps,
            N=len(sources), Q=num_queries, D=width, K=len(parts), RANK=rows.rank,
            BT=BT, BD=channels(sources[0].dtype, 128, 2 * BQ), BQ=BQ, PRECISION=PRECISIONS[sources[0].dtype],
            **resources(BQ),
        )  # fmt: skip
    return rstd, logit


@on_their_device
def mix_forward(sources: Sequence[Tensor], logit: Tensor, factors: Sequence[float]) -> tuple[list[Tensor], Tensor]:
    """Launch the second kernel on the logits of the first.

    Returns:
        Q mixes times their factors, contiguous [..., D], and float32 lse [Q, T].
    """
    rows, width, num_queries = rows_of(sources), sources[0].shape[-1], logit.shape[-1]
    outs = [torch.empty(source.shape, dtype=source.dtype, device=source.device) for source in sources[:1] * num_queries]
    lse = logit.new_empty(num_queries, rows.num_rows)
    BN, BQ = padded(len(sources)), padded(num_queries)
    BD = channels(sources[0].dtype, 512, max(BN, BQ))
    if rows.num_rows:
        count("inter_block.forward")
        # few tokens: share the chunks of one among several programs
        shares = min(triton.cdiv(width, BD), triton.cdiv(MAX_PROGRAMS, rows.num_rows))
        mix_kernel[(rows.num_rows, shares)](
            tuple(sources), rows.strides, rows.sizes, logit, tuple(factors), tuple(outs), lse,
            rows.num_rows, triton.cdiv(triton.cdiv(width, BD), shares),
            N=len(sources), Q=num_queries, D=width, RANK=rows.rank,
            BN=BN, BQ=BQ, BD=BD, BYTES=alignment(sources, outs), PRECISION=PRECISIONS[sources[0].dtype],
            **resources(max(BN, BQ)),
        )  # fmt: skip
    return outs, lse
