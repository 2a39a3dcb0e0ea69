"""The FX node of phase 1, what runs behind it, and the custom ops around its kernels.

%inter = inter_block(sources=[%embedding, %block_1], queries=[%q1, %q2], key_norms=[%g1, %g2], eps=1e-6,
                     factors=[2.0, 1.0])
%outs, %lses = %inter[0], %inter[1]

The mix of one source is that source: nothing is written, and only its logits are computed.

Under torch.compile the mixes are made again for the backward, from the sources and the saved logits: one op makes the
logits, another the mixes, and that one is a checkpoint. Run eagerly, they are kept for it. Without gradients one op
makes both.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from attnres_rewrite.kernels.inter_block import cpu, reference
from attnres_rewrite.kernels.probes import probe_of
from attnres_rewrite.kernels.routes import is_for_cpp, runs_kernel

# of one launch: more would not fit into the registers, nor, of many sources, into the 99 KiB of shared memory that a
# block has on smaller GPUs; every other launch reads the sources once more
MAX_QUERIES, MANY_SOURCES = 64, 128


@fx.wrap
def inter_block(
    sources: Sequence[Tensor],
    queries: Sequence[Tensor],
    key_norms: Sequence[Tensor] | None,
    eps: float,
    factors: Sequence[float] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Mix the sources for all queries of a block; see reference.inter_block for the formula, shapes and dtypes."""
    if runs_kernel("inter_block", sources):
        return inter_block_by_kernel(sources, queries, key_norms, eps, factors)
    return reference.inter_block(sources, queries, key_norms, eps, factors)


def inter_block_by_kernel(
    sources: Sequence[Tensor],
    queries: Sequence[Tensor],
    key_norms: Sequence[Tensor] | None,
    eps: float,
    factors: Sequence[float] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return Q mixes [..., D] and Q log-sum-exps [...] from the kernels."""
    gains: Sequence[Tensor | None] = [None] * len(queries) if key_norms is None else key_norms
    scales = [1.0] * len(queries) if factors is None else list(factors)
    probes = [probe_of(query, gain) for query, gain in zip(queries, gains, strict=True)]
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    at_once = MAX_QUERIES if len(sources) <= MANY_SOURCES else MAX_QUERIES // 2
    for first in range(0, len(probes), at_once):
        group, own = torch.stack(probes[first : first + at_once]), scales[first : first + at_once]
        if len(sources) == 1:
            mixes = [sources[0] if factor == 1.0 else sources[0] * factor for factor in own]
            lse, _, _ = torch.ops.attnres.inter_block_of_one(sources[0], group, eps)
        else:
            mixes, lse = _mixes(list(sources), group, eps, own)
        outs += mixes
        # one unbind: its gradient is one stack, that of Q selections would be Q sums
        lses += [row.reshape(sources[0].shape[:-1]) for row in lse.unbind(0)]
    return outs, lses


def _mixes(sources: list[Tensor], probes: Tensor, eps: float, factors: list[float]) -> tuple[list[Tensor], Tensor]:
    if not torch.is_grad_enabled():
        return torch.ops.attnres.inter_block_without_grad(sources, probes, eps, factors)
    # their gradient is part of that of the mixes: one backward reads the sources once for both
    rstd, logit = torch.ops.attnres.inter_logits([source.detach() for source in sources], probes.detach(), eps)
    if torch.compiler.is_compiling():
        # checkpoint is declared to return one tensor; it returns what its function does
        return checkpoint(  # type: ignore[return-value]
            torch.ops.attnres.inter_block, sources, probes, rstd, logit, factors, use_reentrant=False
        )
    return torch.ops.attnres.inter_block(sources, probes, rstd, logit, factors)


def _logits_forward(sources: Sequence[Tensor], probes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if is_for_cpp(probes):
        return cpu.logits_forward(sources, probes, eps)
    from attnres_rewrite.kernels.inter_block.triton_forward import logits_forward

    return logits_forward(sources, probes, eps)


@torch.library.custom_op("attnres::inter_logits", mutates_args=())
def _inter_logits(sources: list[Tensor], probes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return rstd [T, N] and logits [T, N, Q], float32; they have no gradient of their own."""
    return _logits_forward(sources, probes, eps)


@_inter_logits.register_fake
def _(sources: list[Tensor], probes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _, rstd, logit = _empty_scalars(sources, probes)
    return rstd, logit


@torch.library.custom_op("attnres::inter_block", mutates_args=())
def _inter_block(
    sources: list[Tensor], probes: Tensor, rstd: Tensor, logit: Tensor, factors: list[float]
) -> tuple[list[Tensor], Tensor]:
    """Return Q mixes times their factors [..., D] and lse [Q, T]; their gradient goes through the logits, too."""
    if is_for_cpp(logit):
        return cpu.mix_forward(sources, logit, factors)
    from attnres_rewrite.kernels.inter_block.triton_forward import mix_forward

    return mix_forward(sources, logit, factors)


@_inter_block.register_fake
def _(sources: list[Tensor], probes: Tensor, *_: Any) -> tuple[list[Tensor], Tensor]:
    return _empty_mixes(sources, probes)


@torch.library.custom_op("attnres::inter_block_without_grad", mutates_args=())
def _inter_block_without_grad(
    sources: list[Tensor], probes: Tensor, eps: float, factors: list[float]
) -> tuple[list[Tensor], Tensor]:
    """Return what inter_block returns, from the sources."""
    if is_for_cpp(probes):
        return cpu.forward(sources, probes, eps, factors)
    from attnres_rewrite.kernels.inter_block.triton_forward import logits_forward, mix_forward

    _, logit = logits_forward(sources, probes, eps)
    return mix_forward(sources, logit, factors)


@_inter_block_without_grad.register_fake
def _(sources: list[Tensor], probes: Tensor, *_: Any) -> tuple[list[Tensor], Tensor]:
    return _empty_mixes(sources, probes)


@torch.library.custom_op("attnres::inter_block_of_one", mutates_args=())
def _inter_block_of_one(source: Tensor, probes: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return lse [Q, T], rstd [T, 1] and logits [T, 1, Q]."""
    rstd, logit = _logits_forward([source], probes, eps)
    return logit.squeeze(1).t().clone(memory_format=torch.contiguous_format), rstd, logit


@_inter_block_of_one.register_fake
def _(source: Tensor, probes: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_scalars([source], probes)


@torch.library.custom_op("attnres::inter_block_backward", mutates_args=())
def _inter_block_backward(
    grads: list[Tensor | None],
    dlse: Tensor | None,
    sources: list[Tensor],
    probes: Tensor,
    rstd: Tensor,
    logit: Tensor,
    factors: list[float],
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of the sources and of the probes; see triton_backward.inter_block_backward."""
    if is_for_cpp(probes):
        return cpu.inter_block_backward(grads, dlse, sources, probes, rstd, logit, factors)
    from attnres_rewrite.kernels.inter_block.triton_backward import inter_block_backward

    return inter_block_backward(grads, dlse, sources, probes, rstd, logit, factors)


@_inter_block_backward.register_fake
def _(
    grads: list[Tensor | None], dlse: Tensor | None, sources: list[Tensor], probes: Tensor, *_: Any
) -> tuple[list[Tensor], Tensor]:
    gradients = [torch.empty(source.shape, dtype=source.dtype, device=source.device) for source in sources]
    return gradients, torch.empty_like(probes)


def _empty_mixes(sources: Sequence[Tensor], probes: Tensor) -> tuple[list[Tensor], Tensor]:
    outs = [torch.empty(sources[0].shape, dtype=sources[0].dtype, device=probes.device) for _ in probes]
    return outs, _empty_scalars(sources, probes)[0]


def _empty_scalars(sources: Sequence[Tensor], probes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # not shape.numel(), which makes a dynamic size the one it has now
    num_tokens, num_queries = math.prod(sources[0].shape[:-1]), probes.shape[0]
    rstd = probes.new_empty(num_tokens, len(sources))
    return probes.new_empty(num_queries, num_tokens), rstd, probes.new_empty(*rstd.shape, num_queries)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    sources, *scalars, ctx.factors = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*sources, *scalars)


def _backward(ctx: Any, grads: list[Tensor | None], dlse: Tensor | None) -> tuple[Any, ...]:
    *sources, probes, rstd, logit = ctx.saved_tensors
    dsources, dprobes = torch.ops.attnres.inter_block_backward(grads, dlse, sources, probes, rstd, logit, ctx.factors)
    return dsources, dprobes, None, None, None


def _save_one(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    source, probes, _ = inputs
    _, rstd, logit = output
    ctx.mark_non_differentiable(rstd, logit)
    _save(ctx, ([source], probes, rstd, logit, [1.0] * len(probes)), output)


def _backward_of_one(ctx: Any, dlse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    (dsource,), dprobes = _backward(ctx, [], dlse)[:2]
    return dsource, dprobes, None


_inter_block.register_autograd(_backward, setup_context=_save)
_inter_block_of_one.register_autograd(_backward_of_one, setup_context=_save_one)
