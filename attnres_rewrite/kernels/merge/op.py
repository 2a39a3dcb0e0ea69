"""The FX nodes of phase 2, what runs behind them, and the custom op around its kernels.

%read = merge(inter_out=%out, lse=%lse, partial=%partial, query=%q, key_norm=%g, eps=1e-6, factor=9.0)
       with recency_bias=2.0, lse=%biased = with_recency_bias(lse=%lse, recency_bias=2.0)
%pair = add_merge_norm(partial=%partial, update=%mlp, inter_out=%out, ..., norm="rms"): the new partial, the normed read

One op serves both: a merge adds nothing and has norm "none".
"""

import math
from typing import Any

import torch
from torch import Tensor, fx

from attnres_rewrite.kernels.merge import cpu, reference
from attnres_rewrite.kernels.probes import probe_of
from attnres_rewrite.kernels.routes import is_for_cpp, runs_kernel


@fx.wrap
def merge(
    inter_out: Tensor, lse: Tensor, partial: Tensor, query: Tensor, key_norm: Tensor | None, eps: float, factor: float
) -> Tensor:
    """Merge the partial sum into a phase-1 result; see reference.merge for the formula, shapes and dtypes."""
    if runs_kernel("merge", [inter_out, partial]):
        return merge_by_kernel(inter_out, lse, partial, query, key_norm, eps, factor)
    return reference.merge(inter_out, lse, partial, query, key_norm, eps, factor)


@fx.wrap
def with_recency_bias(lse: Tensor, recency_bias: float) -> Tensor:
    """Take the bias of the newest source off the log-sum-exp of the others: for a merge it is on the logit then."""
    return lse - recency_bias


@fx.wrap
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
    eps: float,
    factor: float,
    norm: str,
) -> tuple[Tensor, Tensor]:
    """Add, merge and normalise; see reference.add_merge_norm for the formula, shapes and dtypes."""
    by_kernel = runs_kernel("add_merge_norm", [partial, inter_out], update)
    run = add_merge_norm_by_kernel if by_kernel else reference.add_merge_norm
    return run(partial, update, inter_out, lse, query, key_norm, norm_weight, norm_bias, norm_eps, eps, factor, norm)


def merge_by_kernel(
    inter_out: Tensor, lse: Tensor, partial: Tensor, query: Tensor, key_norm: Tensor | None, eps: float, factor: float
) -> Tensor:
    """Return the merge [..., D] from the kernel."""
    # kernels take it as it lies in memory
    probe, lse = probe_of(query, key_norm), lse.to(torch.float32)
    return torch.ops.attnres.merge(partial, None, inter_out, lse, probe, None, None, "none", 0.0, eps, factor)[1]


def add_merge_norm_by_kernel(
    partial: Tensor,
    update: Tensor | None,
    inter_out: Tensor,
    lse: Tensor,
    query: Tensor,
    key_norm: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    eps: float,
    factor: float,
    norm: str,
) -> tuple[Tensor, Tensor]:
    """Return the new partial sum and the normed mix [..., D] from the kernel."""
    probe, lse = probe_of(query, key_norm), lse.to(torch.float32)
    weight, bias = (vector if vector is None else vector.contiguous() for vector in (norm_weight, norm_bias))
    if norm_eps is None:
        norm_eps = torch.finfo(torch.float32).eps
    total, normed, _ = torch.ops.attnres.merge(
        partial, update, inter_out, lse, probe, weight, bias, norm, norm_eps, eps, factor
    )
    return partial if update is None else total, normed


@torch.library.custom_op("attnres::merge", mutates_args=())
def _merge(
    partial: Tensor,
    update: Tensor | None,
    inter_out: Tensor,
    lse: Tensor,
    probe: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    norm_eps: float,
    eps: float,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new partial sum [..., D], the mix [..., D] and scalars [T, 4]; see triton_forward.merge_forward.

    Without an update the first is empty: an op must not return its input.
    """
    if is_for_cpp(partial):
        return cpu.merge_forward(
            partial, update, inter_out, lse, probe, norm_weight, norm_bias, norm, norm_eps, eps, factor
        )
    from attnres_rewrite.kernels.merge.triton_forward import merge_forward

    return merge_forward(partial, update, inter_out, lse, probe, norm_weight, norm_bias, norm, norm_eps, eps, factor)


@_merge.register_fake
def _(partial: Tensor, update: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(partial.shape, dtype=partial.dtype, device=partial.device)
    total = partial.new_empty(0) if update is None else torch.empty_like(out)
    probe = arguments[2]
    return total, out, probe.new_empty(math.prod(partial.shape[:-1]), 4)


@torch.library.custom_op("attnres::merge_backward", mutates_args=())
def _merge_backward(
    grad_total: Tensor | None,
    grad: Tensor,
    total: Tensor,
    inter_out: Tensor,
    lse: Tensor,
    probe: Tensor,
    norm_weight: Tensor | None,
    has_bias: bool,
    stats: Tensor,
    norm: str,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the sum, inter_out, lse and the vectors; see triton_backward.merge_backward."""
    if is_for_cpp(total):
        return cpu.merge_backward(
            grad_total, grad, total, inter_out, lse, probe, norm_weight, has_bias, stats, norm, factor
        )
    from attnres_rewrite.kernels.merge.triton_backward import merge_backward

    return merge_backward(grad_total, grad, total, inter_out, lse, probe, norm_weight, has_bias, stats, norm, factor)


@_merge_backward.register_fake
def _(
    grad_total: Tensor | None,
    grad: Tensor,
    total: Tensor,
    inter_out: Tensor,
    lse: Tensor,
    probe: Tensor,
    norm_weight: Tensor | None,
    has_bias: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtotal, dinter = (torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) for rows in (total, inter_out))
    dlse = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    return dtotal, dinter, dlse, probe.new_empty(1 + (norm_weight is not None) + has_bias, probe.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    partial, update, inter_out, lse, probe, norm_weight, norm_bias, ctx.norm, _, _, ctx.factor = inputs
    total, _, stats = output
    ctx.set_materialize_grads(False)
    ctx.has_update = update is not None
    ctx.bias_dtype = None if norm_bias is None else norm_bias.dtype
    ctx.mark_non_differentiable(*((stats,) if ctx.has_update else (total, stats)))
    ctx.save_for_backward(total if ctx.has_update else partial, inter_out, lse, probe, norm_weight, stats)


def _backward(ctx: Any, grad_total: Tensor | None, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return (grad_total, grad_total if ctx.has_update else None, *[None] * 9)
    total, inter_out, lse, probe, norm_weight, stats = ctx.saved_tensors
    has_bias = ctx.bias_dtype is not None
    dtotal, dinter, dlse, dvectors = torch.ops.attnres.merge_backward(
        grad_total, grad, total, inter_out, lse, probe, norm_weight, has_bias, stats, ctx.norm, ctx.factor
    )
    dweight = None if norm_weight is None else dvectors[1].to(norm_weight.dtype)
    dbias = dvectors[-1].to(ctx.bias_dtype) if has_bias else None
    # the sum hands its gradient on to both of its terms
    dupdate = dtotal if ctx.has_update else None
    return dtotal, dupdate, dinter, dlse, dvectors[0], dweight, dbias, None, None, None, None


_merge.register_autograd(_backward, setup_context=_save)
