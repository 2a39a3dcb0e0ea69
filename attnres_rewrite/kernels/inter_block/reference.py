"""The meaning of phase 1: all queries of a block against the finished sources.

Shape letters: N sources, Q queries, ... any leading dimensions, D channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_rewrite.kernels.mixing import mix_of


def inter_block(
    sources: Sequence[Tensor],
    queries: Sequence[Tensor],
    key_norms: Sequence[Tensor] | None = None,
    eps: float = 1e-6,
    factors: Sequence[float] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Mix the finished sources for every read of a block (arXiv 2603.15031, algorithm 1, phase 1).

        logit_qn = query_q . (RMSNorm(src_n) * key_norm_q)
        out_q    = factor_q * sum_n softmax_n(logit_q)_n * src_n
        lse_q    = log sum_n exp(logit_qn)

    Written over the list, without a stack, so that a compiler can fuse it: each source is normalised once.

    Args:
        sources: N tensors [..., D] of one shape, dtype and device, oldest first.
        queries: Q tensors [D]. Worked with in float32, or float64 for float64 sources.
        key_norms: Q gains [D] of the normalised keys, or None.
        eps: Added to the mean square of a source, in squared units of the sources.
        factors: Of the Q mixes, or None for ones: a read with output="sum" whose sources are all here has the number
            of them, one that is merged later has 1.

    Returns:
        Q mixes [..., D] in the dtype of the sources, and Q log-sum-exps [...] in float32 (float64).
    """
    work = torch.promote_types(sources[0].dtype, torch.float32)
    values = [source.to(work) for source in sources]
    rstds = [torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) for value in values]
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for position, query in enumerate(queries):
        probe = query.to(work) if key_norms is None else query.to(work) * key_norms[position].to(work)
        logits = [(value * probe).sum(-1, keepdim=True) * rstd for value, rstd in zip(values, rstds, strict=True)]
        mixed, total, top = mix_of(logits, values)
        factor = 1.0 if factors is None else factors[position]
        outs.append((mixed * (factor / total)).to(sources[0].dtype))
        lses.append((top + torch.log(total)).squeeze(-1))
    return outs, lses
