"""The meaning of a read: one query against a list of sources.

Shape letters of this folder: S sources, ... any leading dimensions, D channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_rewrite.kernels.mixing import mix_of


def block_attn_res(
    sources: Sequence[Tensor],
    query: Tensor,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    output: str = "sum",
) -> Tensor:
    """Mix depth sources by softmax attention over them (arXiv 2603.15031, equations 2 to 4).

        key_s  = src_s / sqrt(mean(src_s^2) + eps) * key_norm
        mix    = sum_s softmax_s(query . key_s) * src_s          values are not normalised
        result = mix ("mean"), or S * mix ("sum")

    With a zero query every weight is 1/S, so "sum" is the plain sum of the sources. Written over the list,
    without a stack, so that a compiler can fuse it into one loop over D.

    Args:
        sources: S tensors [..., D] of one shape, dtype and device, oldest first.
        query: [D]. Worked with in float32, or float64 for float64 sources.
        key_norm: Gain of the normalised keys [D], or None.
        eps: Added to the mean square of a source, in squared units of the sources.
        output: "sum" or "mean".

    Returns:
        The mix [..., D] in the dtype of the sources, cast once.
    """
    values, logits = _values_and_logits(sources, query, key_norm, eps)
    mixed, total, _ = mix_of(logits, values)
    factor = len(sources) if output == "sum" else 1
    return (mixed * (factor / total)).to(sources[0].dtype)


def weights_of(sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Return the softmax weights [..., S] of `block_attn_res`, in float32 or float64."""
    _, logits = _values_and_logits(sources, query, key_norm, eps)
    return torch.softmax(torch.cat(logits, -1), -1)


def _values_and_logits(
    sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    work = torch.promote_types(sources[0].dtype, torch.float32)
    probe = query.to(work) if key_norm is None else query.to(work) * key_norm.to(work)
    values = [source.to(work) for source in sources]
    logits = [
        (value * probe).sum(-1, keepdim=True) * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
        for value in values
    ]
    return values, logits
