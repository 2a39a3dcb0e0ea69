"""What is done over a list of sources, without a stack: the softmax mix that references share, and the gated sum."""

from collections.abc import Sequence

import torch
from torch import Tensor


def mix_of(logits: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mix S values [..., D] by the exponentials of S logits [..., 1], without a stack.

    Returns:
        The sum of exp(logit - top) * value [..., D], the sum of exp(logit - top) and top, the largest logit [..., 1].
    """
    top = logits[0]
    for logit in logits[1:]:
        top = torch.maximum(top, logit)
    weights = [torch.exp(logit - top) for logit in logits]
    total, mixed = weights[0], weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight
        mixed = mixed + weight * value
    return mixed, total, top


def gated_sum(sources: Sequence[Tensor], mix: Tensor, gate: Tensor) -> Tensor:
    """Add a mix [..., D] times its gate [D] to the sum of the sources, in float32 (float64), cast once."""
    work = torch.promote_types(mix.dtype, torch.float32)
    total = gate.to(work) * mix.to(work)
    for source in sources:
        total = total + source.to(work)
    return total.to(mix.dtype)
