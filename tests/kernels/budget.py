"""The error budget of a kernel: twice the rounding error of the reference in the same precision."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnres_rewrite.kernels.routes import launches

FEW = 16  # tokens

Operation = Callable[[Sequence[Tensor]], Sequence[Tensor]]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int) -> Tensor:
    """Draw a normal tensor on the device of the kernel tests that asks for its gradient."""
    noise = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=noise)).to(DEVICE, dtype).requires_grad_()


def launched() -> dict[str, int]:
    """Return how often each kernel was launched, in whichever language."""
    return {name.removesuffix(" (C++)"): count for name, count in launches().items()}


def run(operation: Operation, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs, and the gradient of every input for one fixed random weighting of the outputs."""
    outputs = operation(inputs)
    noise = torch.Generator().manual_seed(99)
    weights = [torch.randn(out.shape, generator=noise).to(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, inputs, weights, allow_unused=True, materialize_grads=True)
    return [value.detach() for value in (*outputs, *gradients)]


def assert_within_twice_rounding(kernel: Operation, reference: Operation, inputs: Sequence[Tensor]) -> None:
    """Compare outputs and every gradient, by norm, with the float64 reference.

    The floor under the budget, one float32 rounding, is for results that the reference gets exactly. Where there are
    few tokens, the rounding of their scalars is luck: all results have the budget of the worst.
    """
    exact = run(reference, [value.detach().double().requires_grad_() for value in inputs])
    rounded, found = run(reference, inputs), run(kernel, inputs)
    assert len(found) == len(exact)
    few = inputs[0].shape[:-1].numel() < FEW
    roundings = [_relative(theirs, truth) for theirs, truth in zip(rounded, exact, strict=True)]
    for position, (ours, theirs, truth) in enumerate(zip(found, rounded, exact, strict=True)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), position
        assert torch.isfinite(ours).all(), position
        error = _relative(ours, truth)
        rounding = max(roundings) if few else roundings[position]
        assert error <= 2 * rounding + torch.finfo(torch.float32).eps, (position, error, rounding)


def _relative(found: Tensor, truth: Tensor) -> float:
    """Return the norm of the difference over that of the truth, which may be empty or zero."""
    size, error = truth.norm().item(), (found.double() - truth).norm().item()
    return error / size if size else float("inf") if error else 0.0
