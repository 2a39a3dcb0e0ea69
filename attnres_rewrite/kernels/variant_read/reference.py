"""The meaning of a variant read: several heads, sliced keys, or a bias on the newest source.

Shape letters of this folder: S sources, ... any leading dimensions, D channels, H heads, R channels of a key.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_rewrite.kernels.mixing import mix_of


def variant_attn_res(
    sources: Sequence[Tensor],
    query: Tensor,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    output: str = "sum",
    num_heads: int = 1,
    key_rank: int | None = None,
    recency_bias: float = 0.0,
) -> Tensor:
    """Mix depth sources by softmax attention over them; see AttnResConfig for where each variant is from.

        raw_s    = src_s, or its last R = key_rank channels
        key_s    = raw_s / sqrt(mean(raw_s^2) + eps) * key_norm         over all channels of raw_s, in every head
        logit_sh = sum over the channels c of head h of query_c * key_sc;  logit_Sh += recency_bias for the newest
        mix_c    = sum_s softmax_s(logit_sh)_s * src_sc                  for c in head h
        result   = mix ("mean"), or S * mix ("sum")

    Written over the list, without a stack, so that a compiler can fuse it. With one head, no rank and no bias it is
    read/reference.py.

    Args:
        sources: S tensors [..., D] of one shape, dtype and device, oldest first.
        query: [D], or [R]. Worked with in float32, or float64 for float64 sources.
        key_norm: Gain of the normalised keys [D], or [R], or None.
        eps: Added to the mean square of a key, in squared units of the sources.
        output: "sum" or "mean".
        num_heads: H; head h is the channels h * D / H to (h + 1) * D / H. Divides D; 1 with a key rank.
        key_rank: R, at most D, or None for all channels.
        recency_bias: Added to the logits of the last source.

    Returns:
        The mix [..., D] in the dtype of the sources, cast once.
    """
    values = _values(sources)
    logits = _logits(values, query, key_norm, eps, num_heads, key_rank, recency_bias)
    mixed, total, _ = mix_of(logits, [value.unflatten(-1, (num_heads, -1)) for value in values])
    factor = len(sources) if output == "sum" else 1
    return (mixed * (factor / total)).flatten(-2).to(sources[0].dtype)


def weights_of(
    sources: Sequence[Tensor],
    query: Tensor,
    key_norm: Tensor | None,
    eps: float,
    num_heads: int,
    key_rank: int | None,
    recency_bias: float,
) -> Tensor:
    """Return the softmax weights [..., H, S] of `variant_attn_res`, in float32 or float64."""
    logits = _logits(_values(sources), query, key_norm, eps, num_heads, key_rank, recency_bias)
    return torch.softmax(torch.cat(logits, -1), -1)


def _values(sources: Sequence[Tensor]) -> list[Tensor]:
    work = torch.promote_types(sources[0].dtype, torch.float32)
    return [source.to(work) for source in sources]


def _logits(
    values: Sequence[Tensor],
    query: Tensor,
    key_norm: Tensor | None,
    eps: float,
    num_heads: int,
    key_rank: int | None,
    recency_bias: float,
) -> list[Tensor]:
    """Return the logits of each source [..., H, 1]."""
    work = values[0].dtype
    probe = query.to(work) if key_norm is None else query.to(work) * key_norm.to(work)
    keys = values if key_rank is None else [value[..., -key_rank:] for value in values]
    logits: list[Tensor] = []
    for key in keys:
        rstd = torch.rsqrt(key.square().mean(-1, keepdim=True) + eps)
        by_head = (key * probe).unflatten(-1, (num_heads, -1)).sum(-1, keepdim=True)
        logits.append(by_head * rstd.unsqueeze(-1))
    logits[-1] = logits[-1] + recency_bias
    return logits
