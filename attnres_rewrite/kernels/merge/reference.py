"""The meaning of phase 2: the merge of a phase-1 result with the partial sum, alone and with its neighbours.

Shape letters: ... any leading dimensions, D channels.
"""

import torch
from torch import Tensor


def merge(
    inter_out: Tensor,
    lse: Tensor,
    partial: Tensor,
    query: Tensor,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    factor: float = 1.0,
) -> Tensor:
    """Merge the partial sum into a phase-1 result by online softmax (arXiv 2603.15031, algorithm 1, phase 2).

        logit  = query . (RMSNorm(partial) * key_norm)
        share  = exp(logit) / (exp(lse) + exp(logit))         of the partial sum
        result = factor * ((1 - share) * inter_out + share * partial)

    Args:
        inter_out: Mix of the finished sources [..., D], of inter_block.
        lse: Its log-sum-exp [...], float32 or float64.
        partial: Partial sum of the open block [..., D], in the dtype of `inter_out`.
        query: [D].
        key_norm: Gain of the normalised key [D], or None.
        eps: Added to the mean square of the partial sum, in its squared units.
        factor: The number of all sources for output="sum", else 1.

    Returns:
        [..., D] in the dtype of `partial`, worked out in float32 (float64) and cast once.
    """
    work = torch.promote_types(partial.dtype, torch.float32)
    return _mixed(inter_out.to(work), lse.to(work), partial.to(work), query, key_norm, eps, factor).to(partial.dtype)


def _mixed(
    inter_out: Tensor, lse: Tensor, partial: Tensor, query: Tensor, key_norm: Tensor | None, eps: float, factor: float
) -> Tensor:
    work = partial.dtype
    probe = query.to(work) if key_norm is None else query.to(work) * key_norm.to(work)
    logit = (partial * probe).sum(-1, keepdim=True) * torch.rsqrt(partial.square().mean(-1, keepdim=True) + eps)
    share = torch.sigmoid(logit - lse.unsqueeze(-1))
    rest = torch.sigmoid(lse.unsqueeze(-1) - logit)
    return (factor * rest) * inter_out + (factor * share) * partial


def add_merge_norm(
    partial: Tensor,
    update: Tensor | None,
    inter_out: Tensor,
    lse: Tensor,
    query: Tensor,
    key_norm: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    eps: float = 1e-6,
    factor: float = 1.0,
    norm: str = "rms",
) -> tuple[Tensor, Tensor]:
    """Add an update to the partial sum, merge the sum into a phase-1 result, and normalise the mix: one pass.

        partial = partial + update                                            rounded to its dtype
        mix     = merge(inter_out, lse, partial, query, key_norm)
        normed  = RMSNorm(mix) * norm_weight, or LayerNorm(mix) * norm_weight + norm_bias

    Args:
        partial: Partial sum of the open block before the update [..., D].
        update: What is added [..., D], in its dtype; None when there is nothing to add.
        inter_out: Mix of the finished sources [..., D], of inter_block.
        lse: Its log-sum-exp [...], float32 or float64.
        query: [D].
        key_norm: Gain of the normalised key [D], or None.
        norm_weight: Weight of the norm after the merge [D], or None.
        norm_bias: Bias of that norm [D], or None; for norm="layer" only.
        norm_eps: Added to its mean square ("rms") or variance ("layer"); None is the machine epsilon of the
            dtype that is worked in, as in torch.nn.functional.rms_norm.
        eps: Added to the mean square of the partial sum.
        factor: The number of all sources for output="sum", else 1.
        norm: "rms" or "layer".

    Returns:
        The new partial sum and the normed mix [..., D], in the dtype of `partial`. The mix itself is not rounded.
    """
    work = torch.promote_types(partial.dtype, torch.float32)
    total = partial if update is None else partial + update
    wide = total.to(work)
    mix = _mixed(inter_out.to(work), lse.to(work), wide, query, key_norm, eps, factor)
    if norm == "layer":
        mix = mix - mix.mean(-1, keepdim=True)
    if norm_eps is None:
        norm_eps = torch.finfo(work).eps
    normed = mix * torch.rsqrt(mix.square().mean(-1, keepdim=True) + norm_eps)
    if norm_weight is not None:
        normed = normed * norm_weight.to(work)
    if norm_bias is not None:
        normed = normed + norm_bias.to(work)
    return total, normed.to(partial.dtype)
