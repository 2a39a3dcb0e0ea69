"""The error budget of a kernel: twice the rounding error of the reference in the same precision."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Operation = Callable[[Sequence[Tensor]], Sequence[Tensor]]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates bfloat16 where a GPU rounds it
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def drawn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int) -> Tensor:
    """Draw a normal tensor on the device of the kernel tests that asks for its gradient."""
    noise = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=noise)).to(DEVICE, dtype).requires_grad_()


def run(operation: Operation, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs, and the gradient of every input for one fixed random weighting of the outputs."""
    outputs = operation(inputs)
    noise = torch.Generator().manual_seed(99)
    weights = [torch.randn(out.shape, generator=noise).to(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, inputs, weights, allow_unused=True, materialize_grads=True)
    return [value.detach() for value in (*outputs, *gradients)]


def assert_within_twice_rounding(kernel: Operation, reference: Operation, inputs: Sequence[Tensor]) -> None:
    """Compare outputs and every gradient, by norm, with the float64 reference.

    The floor under the budget, one float32 rounding, is for results that the reference gets exactly.
    """
    exact = run(reference, [value.detach().double().requires_grad_() for value in inputs])
    rounded, found = run(reference, inputs), run(kernel, inputs)
    assert len(found) == len(exact)
    for position, (ours, theirs, truth) in enumerate(zip(found, rounded, exact, strict=True)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), position
        assert torch.isfinite(ours).all(), position
        size = truth.norm()
        error, rounding = ((value.double() - truth).norm() for value in (ours, theirs))
        assert error <= 2 * rounding + torch.finfo(torch.float32).eps * size, (position, error / size, rounding / size)
