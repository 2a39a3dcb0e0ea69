"""What runs an operation, a kernel or plain PyTorch; why; and how often it did.

Plain PyTorch is the meaning. On a GPU Triton kernels run instead, and on a CPU C++ kernels, but there under
torch.compile alone, which needs a C++ compiler anyway. `why_not_kernel` has the reason where they do not: it is
counted, and warned of once where it is on a GPU.
"""

import warnings
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnres_rewrite.kernels.checks import MAX_SOURCES, MAX_WIDTH
from attnres_rewrite.kernels.cpu_library import prepare

_KERNEL_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
_HAS_TRITON = find_spec("triton") is not None
_counts: Counter[str] = Counter()
_is_backend_tracing = False
_is_unnoted = False


def launches() -> Mapping[str, int]:
    """Return how often each kernel was launched since `reset_launches`, by its name.

    Kernels are named as their files are: "read.forward", "merge.backward". An eager call that ran as plain PyTorch
    counts as "read: plain (cpu)", with the reason in parentheses; a variant as "variant_read: plain (no kernel for
    num_heads=4)". Those of a CPU end in "(C++)". Code that Inductor compiled is not counted.
    """
    return dict(_counts)


def reset_launches() -> None:
    """Forget all counts."""
    _counts.clear()


def count(name: str) -> None:
    """Count one launch."""
    _counts[name] += 1


def runs_kernel(operation: str, tensors: Sequence[Tensor], update: Tensor | None = None) -> bool:
    """Say whether the kernels take these tensors [..., D]; count and warn when a GPU runs plain PyTorch.

    The tensors must be of one dtype; an `update` that is added to them may have another, as under autocast.
    """
    reason = why_not_kernel(tensors, update)
    if reason is None:
        return True
    _count_plain(operation, reason, tensors[0])
    return False


def is_for_cpp(tensor: Tensor) -> bool:
    """Say whether the kernel for this tensor is the one in C++."""
    return tensor.device.type == "cpu"


def note_variant(tensor: Tensor, num_heads: int, key_rank: int | None, recency_bias: float) -> None:
    """Count a variant read, which runs as plain PyTorch everywhere; warn once when that is on a GPU."""
    reason = why_no_variant_kernel(num_heads, key_rank, recency_bias)
    if reason is not None:
        _count_plain("variant_read", reason, tensor)


def _count_plain(operation: str, reason: str, tensor: Tensor) -> None:
    if not _is_traced(tensor) and not _is_unnoted:
        count(f"{operation}: plain ({reason})")
        if tensor.is_cuda:
            _warn_once(operation, reason)


def is_exporting() -> bool:
    """Say whether torch.export traces."""
    # what torch.compiler.is_exporting() returns; but Dynamo of torch 2.11 takes that for true in torch.compile, too
    return torch.compiler._is_exporting_flag


@contextmanager
def compiling() -> Generator[None]:
    """Have operations become kernels while a Dynamo backend traces them; torch 2.11 does not tell backends of it."""
    global _is_backend_tracing
    before, _is_backend_tracing = _is_backend_tracing, True
    try:
        yield
    finally:
        _is_backend_tracing = before


@contextmanager
def unnoted() -> Generator[None]:
    """Neither count nor warn where operations run as plain PyTorch: proofs run in float64, whatever the model does."""
    global _is_unnoted
    before, _is_unnoted = _is_unnoted, True
    try:
        yield
    finally:
        _is_unnoted = before


def _is_compiling() -> bool:
    # in this order Dynamo never looks at, and guards, the second
    return torch.compiler.is_compiling() or _is_backend_tracing


def _is_traced(tensor: Tensor) -> bool:
    return _is_compiling() or isinstance(tensor, FakeTensor)


def why_not_kernel(tensors: Sequence[Tensor], update: Tensor | None = None) -> str | None:
    """Return why the kernels cannot take these tensors [..., D], or None."""
    first = tensors[0]
    if first.device.type == "cpu" and (not _is_compiling() or is_exporting()):
        return "cpu"
    reason = why_no_kernel(first.device, first.dtype, len(tensors), first.shape[-1])
    if reason is not None:
        return reason
    added = [] if update is None else [update]
    if any(tensor.dtype != first.dtype for tensor in tensors) or any(u.dtype not in _KERNEL_DTYPES for u in added):
        return "the tensors have several dtypes"
    if any(tensor.stride(-1) != 1 and tensor.shape[-1] != 1 for tensor in (*tensors, *added)):
        return "the channels of a tensor are not contiguous"
    if first.device.type == "cpu" and not prepare(first.dtype):
        return "cpu, no C++ compiler"
    return None


def why_no_kernel(device: torch.device, dtype: torch.dtype, num_sources: int, width: int) -> str | None:
    """Return why no kernel mixes `num_sources` tensors of `width` channels on this device in this dtype, or None.

    Of a CPU it says what is so under torch.compile.
    """
    if device.type not in ("cpu", "cuda"):
        return device.type
    if device.type == "cuda" and not _HAS_TRITON:
        return "triton is not installed"
    if dtype not in _KERNEL_DTYPES:
        return str(dtype).removeprefix("torch.")
    if num_sources > MAX_SOURCES:
        return f"{num_sources} sources, kernels take {MAX_SOURCES}"
    if width > MAX_WIDTH:
        return f"{width} channels, kernels take {MAX_WIDTH}"
    return None


def kernels_of(device: torch.device) -> str:
    """Name the kernels of a device that has some, for reports."""
    return "Triton kernels" if device.type == "cuda" else "C++ kernels under torch.compile, else plain PyTorch"


def why_no_variant_kernel(num_heads: int, key_rank: int | None, recency_bias: float) -> str | None:
    """Return which variant of a direct read has no kernel on any device, or None where it is the plain read."""
    variants = {"num_heads": num_heads != 1, "key_rank": key_rank is not None, "recency_bias": recency_bias != 0}
    values = {"num_heads": num_heads, "key_rank": key_rank, "recency_bias": recency_bias}
    found = [f"{name}={values[name]}" for name, used in variants.items() if used]
    return f"no kernel for {' and '.join(found)}" if found else None


@cache
def _warn_once(operation: str, reason: str) -> None:
    warnings.warn(f"attnres_rewrite: {operation} runs as plain PyTorch, not as a kernel: {reason}", stacklevel=5)
