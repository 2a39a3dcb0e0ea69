"""The FX node of a read, what runs behind it, and the custom ops around its kernels.

%read = block_attn_res(sources=[%embedding, %block_1, %partial], query=%q, key_norm=%g, eps=1e-6, output="sum")
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnres_rewrite.kernels.probes import probe_of
from attnres_rewrite.kernels.read import cpu, reference
from attnres_rewrite.kernels.routes import is_for_cpp, runs_kernel


@fx.wrap
def block_attn_res(
    sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, output: str
) -> Tensor:
    """Mix the sources of one state; see reference.block_attn_res for the formula, shapes and dtypes."""
    if runs_kernel("read", sources):
        return read_by_kernel(sources, query, key_norm, eps, output)[0]
    return reference.block_attn_res(sources, query, key_norm, eps, output)


def read_with_weights(
    sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, output: str
) -> tuple[Tensor, Tensor]:
    """Return the mix, and the softmax weights [..., S], detached."""
    if runs_kernel("read", sources):
        return read_by_kernel(sources, query, key_norm, eps, output)
    with torch.no_grad():
        weights = reference.weights_of(sources, query, key_norm, eps)
    return reference.block_attn_res(sources, query, key_norm, eps, output), weights


def read_by_kernel(
    sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, output: str
) -> tuple[Tensor, Tensor]:
    """Return the mix [..., D] and the softmax weights [..., S], float32 and detached, from the kernel."""
    factor = float(len(sources)) if output == "sum" else 1.0
    out, _, logit = torch.ops.attnres.read(list(sources), probe_of(query, key_norm), eps, factor)
    weights = torch.softmax(logit.detach(), -1).reshape(*out.shape[:-1], len(sources))
    return out, weights


@torch.library.custom_op("attnres::read", mutates_args=())
def read(sources: list[Tensor], probe: Tensor, eps: float, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mix [..., D], rstd [T, S] and logits [T, S]; see triton_forward.read_forward."""
    if is_for_cpp(probe):
        return cpu.read_forward(sources, probe, eps, factor)
    from attnres_rewrite.kernels.read.triton_forward import read_forward

    return read_forward(sources, probe, eps, factor)


@read.register_fake
def _(sources: list[Tensor], probe: Tensor, eps: float, factor: float) -> tuple[Tensor, ...]:
    num_tokens = math.prod(sources[0].shape[:-1])
    scalars = probe.new_empty(num_tokens, len(sources))
    out = torch.empty(sources[0].shape, dtype=sources[0].dtype, device=probe.device)
    return out, scalars, torch.empty_like(scalars)


@torch.library.custom_op("attnres::read_backward", mutates_args=())
def read_backward(
    grad: Tensor, sources: list[Tensor], probe: Tensor, rstd: Tensor, logit: Tensor, factor: float
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of the sources and of the probe; see triton_backward.read_backward."""
    if is_for_cpp(probe):
        return cpu.read_backward(grad, sources, probe, rstd, logit, factor)
    from attnres_rewrite.kernels.read import triton_backward

    return triton_backward.read_backward(grad, sources, probe, rstd, logit, factor)


@read_backward.register_fake
def _(grad: Tensor, sources: list[Tensor], probe: Tensor, *_: Any) -> tuple[list[Tensor], Tensor]:
    gradients = [torch.empty(source.shape, dtype=source.dtype, device=source.device) for source in sources]
    return gradients, torch.empty_like(probe)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    sources, probe, _, ctx.factor = inputs
    _, rstd, logit = output
    ctx.mark_non_differentiable(rstd, logit)
    ctx.save_for_backward(*sources, probe, rstd, logit)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    *sources, probe, rstd, logit = ctx.saved_tensors
    dsources, dprobe = torch.ops.attnres.read_backward(grad, sources, probe, rstd, logit, ctx.factor)
    return dsources, dprobe, None, None


read.register_autograd(_backward, setup_context=_save)
