"""Attention Residuals as operations, without the rewriter (arXiv 2603.15031).

    from attnres_rewrite import functional as F

    # one read, directly
    h = F.attn_res_read([embedding, block_1, partial], query, key_norm)

    # phase 1, once a block; phase 2, at each read
    outs, lses = F.inter_block([embedding, block_1], queries, key_norms)
    h = F.merge(outs[0], lses[0], partial, queries[0], key_norms[0])

    # phase 2 with the add before it and the norm after it
    partial, y = F.add_merge_norm(
        partial, update, outs[1], lses[1], queries[1], key_norms[1], weight, None, 1e-6
    )

On a GPU each is a `torch.library` custom op around Triton kernels, differentiable, and one node for torch.compile. On
a CPU torch.compile makes it one too, around kernels in C++; run eagerly, and on any other device, it is plain PyTorch
over the list of sources. float64, and channels that are not contiguous, run as plain PyTorch everywhere; on a GPU that
is warned of, and `launches` says so. So do the variants of a read.

Sources are a list or tuple of tensors [..., D] of one shape, dtype and device; leading dimensions may have any strides.
Sums are float32 (float64 for float64), results are cast once to the dtype of the sources. At most 256 sources and
16384 channels. In the byte counts, u is one row of D in the dtype of the sources.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from attnres_rewrite.kernels.checks import (
    check_like,
    check_listed,
    check_number,
    check_scalars,
    check_sources,
    check_tensor,
    check_variant,
    check_variant_width,
    check_vector,
)
from attnres_rewrite.kernels.inter_block import op as inter_block_op
from attnres_rewrite.kernels.merge import op as merge_op
from attnres_rewrite.kernels.mixing import gated_sum
from attnres_rewrite.kernels.read import op as read_op
from attnres_rewrite.kernels.routes import launches, reset_launches, why_no_variant_kernel
from attnres_rewrite.kernels.variant_read import op as variant_op

__all__ = ["add_merge_norm", "attn_res_read", "inter_block", "launches", "merge", "reset_launches"]

Output = Literal["sum", "mean"]


def attn_res_read(
    sources: Sequence[Tensor],
    query: Tensor,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    output: Output = "mean",
    return_weights: bool = False,
    *,
    num_heads: int = 1,
    key_rank: int | None = None,
    gate: Tensor | None = None,
    recency_bias: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mix S sources by the softmax of one query against their normalised keys (equations 2 to 4).

        weight_s = softmax_s(query . (RMSNorm(source_s) * key_norm))
        mix      = sum_s weight_s * source_s

    Bytes a token: S + 1 u forward, 2S + 1 u backward.

    The last four arguments are its variants, with the meaning that AttnResConfig gives them. A read with several
    heads, sliced keys or a bias has no kernel and runs as plain PyTorch. A gate is a product and a sum of the sources
    behind the read, plain PyTorch too, which torch.compile fuses.

    Args:
        sources: S tensors [..., D], oldest first.
        query: [D], any floating dtype. With zeros every weight is 1/S. With a key rank [key_rank].
        key_norm: Gain of the normalised keys, of the shape of `query`, or None for ones.
        eps: Added to the mean square of a source, in its squared units.
        output: "mean" returns the mix, as the paper does; "sum" returns S times the mix.
        return_weights: Return the weights [..., S] too, float32 (float64), detached; with several heads [..., H, S].
        num_heads: H, which divides D: a softmax for each group of D / H channels.
        key_rank: Keys are the last `key_rank` channels of a source; not with several heads.
        gate: [D]; returns the sum of the sources plus gate times the mix, and goes with output="mean" alone.
        recency_bias: Added to the logit of the last source.

    Returns:
        [..., D] in the dtype of the sources, or that and the weights.

    Raises:
        TypeError: `sources` is not a list or tuple of floating-point tensors, a parameter is no tensor, or a count no
            integer.
        ValueError: Shapes, dtypes or devices do not agree, a limit is passed, or arguments contradict; both values are
            named.
    """
    check_sources(sources)
    check_variant(num_heads, key_rank, recency_bias)
    check_variant_width(num_heads, key_rank, sources[0].shape[-1], "the sources")
    check_vector(query, sources[0], "query", key_rank)
    if key_norm is not None:
        check_vector(key_norm, sources[0], "key_norm", key_rank)
    check_scalars(eps, output)
    _check_gate(gate, sources[0], output)
    variant = num_heads, key_rank, recency_bias
    if why_no_variant_kernel(*variant) is None:
        run = read_op.read_with_weights if return_weights else read_op.block_attn_res
        found = run(sources, query, key_norm, eps, output)
    else:
        run = variant_op.variant_read_with_weights if return_weights else variant_op.variant_attn_res
        found = run(sources, query, key_norm, eps, output, *variant)
    if gate is None:
        return found
    if isinstance(found, tuple):
        return gated_sum(sources, found[0], gate), found[1]
    return gated_sum(sources, found, gate)


def inter_block(
    sources: Sequence[Tensor], queries: Sequence[Tensor], key_norms: Sequence[Tensor] | None = None, eps: float = 1e-6
) -> tuple[list[Tensor], list[Tensor]]:
    """Mix the N finished sources for all Q reads of a block at once (algorithm 1, phase 1).

        logit_qn = query_q . (RMSNorm(source_n) * key_norm_q)
        out_q    = sum_n softmax_n(logit_q) * source_n
        lse_q    = log sum_n exp(logit_qn)

    Bytes a token: 2N + Q u forward, 2Q + 3N u backward. The mixes are not saved for backward.

    Args:
        sources: N tensors [..., D].
        queries: Q tensors [D].
        key_norms: Q gains [D], or None for ones.
        eps: Added to the mean square of a source, in its squared units.

    Returns:
        Q mixes [..., D] in the dtype of the sources, and Q log-sum-exps [...] in float32 (float64).

    Raises:
        TypeError: `sources` or `queries` is not a list or tuple of floating-point tensors.
        ValueError: Shapes, dtypes, devices or numbers do not agree, or a limit is passed; both values are named.
    """
    check_sources(sources)
    check_scalars(eps, "mean")
    check_listed(queries, "queries")
    if not queries:
        raise ValueError("queries is empty; phase 1 mixes for at least one read")
    for position, query in enumerate(queries):
        check_vector(query, sources[0], f"queries[{position}]")
    if key_norms is not None:
        check_listed(key_norms, "key_norms")
        if len(key_norms) != len(queries):
            raise ValueError(f"there are {len(key_norms)} key_norms for {len(queries)} queries; they must agree")
        for position, gain in enumerate(key_norms):
            check_vector(gain, sources[0], f"key_norms[{position}]")
    outs, lses = inter_block_op.inter_block(sources, queries, key_norms, eps)
    # a mix of one source is that source, and what is compiled returns it as it is
    return ([out.clone() for out in outs] if len(sources) == 1 else outs), lses


def merge(
    inter_out: Tensor,
    lse: Tensor,
    partial: Tensor,
    query: Tensor,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    output: Output = "mean",
    num_sources: int | None = None,
) -> Tensor:
    """Merge the partial sum of the open block into a phase-1 result (algorithm 1, phase 2).

    The result is what `attn_res_read` gives for the finished sources and the partial sum together.

    Bytes a token: 3 u forward, 5 u backward.

    Args:
        inter_out: One of the mixes of `inter_block` [..., D].
        lse: Its log-sum-exp [...], float32 (float64).
        partial: Partial sum [..., D], in the dtype of `inter_out`.
        query: [D], the one given to `inter_block`.
        key_norm: Its gain [D], or None for ones.
        eps: Added to the mean square of the partial sum, in its squared units.
        output: "mean" returns the mix; "sum" returns `num_sources` times the mix.
        num_sources: Of the whole read, the partial sum included; needed for output="sum".

    Returns:
        [..., D] in the dtype of `partial`.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes, dtypes or devices do not agree, or `num_sources` is missing.
    """
    _check_merge(inter_out, lse, partial, query, key_norm, eps, output)
    return merge_op.merge(inter_out, lse, partial, query, key_norm, eps, _factor(output, num_sources))


def add_merge_norm(
    partial: Tensor,
    update: Tensor | None,
    inter_out: Tensor,
    lse: Tensor,
    query: Tensor,
    key_norm: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    eps: float = 1e-6,
    output: Output = "mean",
    num_sources: int | None = None,
    norm: Literal["rms", "layer"] = "rms",
) -> tuple[Tensor, Tensor]:
    """Do `partial + update`, `merge` and the norm of the next sub-layer in one pass.

        partial = partial + update
        normed  = RMSNorm(merge(inter_out, lse, partial, ...)) * norm_weight          or LayerNorm(...) + norm_bias

    Bytes a token: 5 u forward, 6 u backward; without fusion 3 + 3 + 2 forward.

    Args:
        partial: Partial sum before the update [..., D].
        update: What the last sub-layer adds [..., D], or None for nothing.
        inter_out: One of the mixes of `inter_block` [..., D].
        lse: Its log-sum-exp [...], float32 (float64).
        query: [D], the one given to `inter_block`.
        key_norm: Its gain [D], or None for ones.
        norm_weight: Weight of the norm [D], or None for ones.
        norm_bias: Bias of the norm [D], or None; only a LayerNorm has one.
        norm_eps: Added to the mean square ("rms") or the variance ("layer") of the mix.
        eps: Added to the mean square of the partial sum.
        output: "mean" or "sum", as in `merge`.
        num_sources: Of the whole read, the partial sum included; needed for output="sum".
        norm: "rms" or "layer".

    Returns:
        The new partial sum and the normed mix [..., D], in the dtype of `partial`. The mix is not rounded in between.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes, dtypes or devices do not agree, `num_sources` is missing, or an RMSNorm has a bias.
    """
    _check_merge(inter_out, lse, partial, query, key_norm, eps, output)
    if update is not None:
        check_like(update, partial, "update", "partial")
    for vector, name in ((norm_weight, "norm_weight"), (norm_bias, "norm_bias")):
        if vector is not None:
            check_vector(vector, partial, name)
    if norm not in ("rms", "layer"):
        raise ValueError(f"norm={norm!r} must be 'rms' or 'layer'")
    if norm == "rms" and norm_bias is not None:
        raise ValueError("norm_bias is given with norm='rms', which has none; use norm='layer'")
    check_number(norm_eps, "norm_eps")
    if not norm_eps >= 0:
        raise ValueError(f"norm_eps={norm_eps!r} must not be negative")
    return merge_op.add_merge_norm(
        partial, update, inter_out, lse, query, key_norm, norm_weight, norm_bias, norm_eps, eps,
        _factor(output, num_sources), norm,
    )  # fmt: skip


def _check_gate(gate: Tensor | None, like: Tensor, output: str) -> None:
    if gate is None:
        return
    check_vector(gate, like, "gate")
    if output != "mean":
        raise ValueError(f"gate is given with output={output!r}: it adds the mean mix to the sum; use output='mean'")


def _check_merge(
    inter_out: Tensor, lse: Tensor, partial: Tensor, query: Tensor, key_norm: Tensor | None, eps: float, output: str
) -> None:
    check_sources([partial], "partial")
    check_like(inter_out, partial, "inter_out", "partial")
    check_tensor(lse, "lse")
    if lse.shape != partial.shape[:-1] or lse.device != partial.device:
        raise ValueError(
            f"lse has shape {tuple(lse.shape)} on {lse.device}; a partial sum of shape {tuple(partial.shape)} "
            f"on {partial.device} needs {tuple(partial.shape[:-1])}"
        )
    check_vector(query, partial, "query")
    if key_norm is not None:
        check_vector(key_norm, partial, "key_norm")
    check_scalars(eps, output)


def _factor(output: str, num_sources: int | None) -> float:
    if output == "mean":
        return 1.0
    if num_sources is None:
        raise ValueError("output='sum' needs num_sources, the number of all sources of the read")
    # callers are not all type-checked
    if isinstance(num_sources, bool) or not isinstance(num_sources, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"num_sources={num_sources!r} must be an integer")
    if num_sources < 1:
        raise ValueError(f"num_sources={num_sources} must be at least 1")
    return float(num_sources)
