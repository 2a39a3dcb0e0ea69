"""The FX node of a variant read. There is no kernel for it: it is plain PyTorch on every device, and says so.

%read = variant_attn_res(sources=[%embedding, %block_1, %partial], query=%q, key_norm=%g, eps=1e-6, output="sum",
                         num_heads=4, key_rank=None, recency_bias=0.0)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from attnres_rewrite.kernels.routes import note_variant
from attnres_rewrite.kernels.variant_read import reference


@fx.wrap
def variant_attn_res(
    sources: Sequence[Tensor],
    query: Tensor,
    key_norm: Tensor | None,
    eps: float,
    output: str,
    num_heads: int,
    key_rank: int | None,
    recency_bias: float,
) -> Tensor:
    """Mix the sources of one state; see reference.variant_attn_res for the formula, shapes and dtypes."""
    note_variant(sources[0], num_heads, key_rank, recency_bias)
    return reference.variant_attn_res(sources, query, key_norm, eps, output, num_heads, key_rank, recency_bias)


def variant_read_with_weights(
    sources: Sequence[Tensor],
    query: Tensor,
    key_norm: Tensor | None,
    eps: float,
    output: str,
    num_heads: int,
    key_rank: int | None,
    recency_bias: float,
) -> tuple[Tensor, Tensor]:
    """Return the mix, and the softmax weights [..., H, S], or [..., S] of one head, detached."""
    with torch.no_grad():
        weights = reference.weights_of(sources, query, key_norm, eps, num_heads, key_rank, recency_bias)
    weights = weights.squeeze(-2) if num_heads == 1 else weights
    return variant_attn_res(sources, query, key_norm, eps, output, num_heads, key_rank, recency_bias), weights
