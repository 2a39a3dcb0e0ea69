"""The gradients of one rank's stages as those of the model: tied copies added up, the norm that of all ranks.

A parameter that several stages use has a copy in each. Once they are added up, all copies have the model's gradient,
and it counts once in the norm of all parameters.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class TiedParameter:
    """A parameter of several stages: the copies on this rank, and the processes that have others."""

    name: str
    copies: tuple[nn.Parameter, ...]
    num_copies: int  # on all ranks
    group: Any  # a ProcessGroup, or None where all copies are on this rank


def add_up(tied: Iterable[TiedParameter]) -> None:
    """Give all copies of every tied parameter the sum of their gradients."""
    for each in tied:
        for parameter in each.copies:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = [_local(parameter.grad) for parameter in each.copies]
        total = torch.stack(gradients).sum(0)
        if each.group is not None:
            dist.all_reduce(total, group=each.group)
        for gradient in gradients:
            gradient.copy_(total)
        _mark(each)


def check_unreduced(tied: Iterable[TiedParameter], what: str) -> None:
    """Refuse gradients that are sums over all copies: adding them up once more would count each several times.

    Raises:
        RuntimeError: `what` comes where it has no place.
    """
    for each in tied:
        if any(_is_sum(parameter.grad) for parameter in each.copies):
            raise RuntimeError(
                f"{what}, and {each.name} still has the sum of the first: call it once, after the last step "
                "whose gradients the optimizer takes, and optimizer.zero_grad() before the next step"
            )


def clip(
    parameters: Sequence[nn.Parameter],
    tied: Sequence[TiedParameter],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Tensor:
    """Scale gradients in place so that their norm, that of all ranks, is at most `max_norm`; return what it was.

    Raises:
        RuntimeError: A tied parameter has gradients that are not added up; or the norm is not finite.
        ValueError: `norm_type` is not positive.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type is {norm_type}: it is a positive number, or inf")
    for each in tied:
        if any(parameter.grad is not None and not _is_sum(parameter.grad) for parameter in each.copies):
            raise RuntimeError(
                f"clip_grad_norm_() comes after reduce_tied_gradients(), and {each.name} is not added up"
            )
    total = _norm_of_all_ranks(parameters, tied, norm_type, group, device)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(f"the norm of the gradients of all ranks is {total.item()}: nothing was clipped")
    # torch takes no list with sharded and whole gradients
    for alike in _by_mesh(parameters).values():
        nn.utils.clip_grads_with_norm_(alike, max_norm, total)
    for each in tied:
        _mark(each)
    return total


def _norm_of_all_ranks(
    parameters: Sequence[nn.Parameter],
    tied: Sequence[TiedParameter],
    norm_type: float,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Tensor:
    counts = {id(parameter): each.num_copies for each in tied for parameter in each.copies}
    is_max = math.isinf(norm_type)
    # the squares of float32 norms may be out of its range
    total = torch.zeros((), dtype=torch.float64, device=device)
    for count in sorted({1, *counts.values()}):
        own = [parameter for parameter in parameters if counts.get(id(parameter), 1) == count]
        for alike in _by_mesh(own).values():
            norm = nn.utils.get_total_norm([parameter.grad for parameter in alike], norm_type)
            norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(total)
            total = torch.maximum(total, norm) if is_max else total + norm**norm_type / count
    dist.all_reduce(total, dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM, group=group)
    total = total if is_max else total ** (1 / norm_type)
    widest = max((parameter.dtype for parameter in parameters), key=lambda dtype: dtype.itemsize, default=torch.float32)
    return total.to(torch.promote_types(widest, torch.float32))


def _by_mesh(parameters: Iterable[nn.Parameter]) -> dict[Any, list[Any]]:
    """Put together the parameters with a gradient that are sharded alike."""
    found: dict[Any, list[Any]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            found.setdefault(mesh, []).append(parameter)
    return found


def _local(gradient: Any) -> Tensor:
    """Return this process's shard of a gradient that fully_shard distributes: tied copies are sharded alike."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _mark(tied: TiedParameter) -> None:
    """Remember that the gradients are sums; what is written into one later, such as zeros, makes another version."""
    for parameter in tied.copies:
        gradient: Any = parameter.grad
        if gradient is not None:
            gradient._attnres_reduced = gradient._version


def _is_sum(gradient: Tensor | None) -> bool:
    return gradient is not None and getattr(gradient, "_attnres_reduced", None) == gradient._version
