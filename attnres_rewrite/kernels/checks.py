"""Say what is wrong with the arguments of an operation: the argument, and both values."""

import math
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

MAX_SOURCES = 256
MAX_WIDTH = 16384
# e^100 is beyond float32 already
MAX_BIAS = 10_000.0


def check_sources(sources: object, name: str = "sources") -> None:
    """Check S tensors [..., D] of one shape, dtype and device.

    Raises:
        TypeError: It is a tensor (a stack), or holds something else than floating-point tensors.
        ValueError: There are none or too many, they do not agree, or D is too large.
    """
    if isinstance(sources, Tensor) or not isinstance(sources, list | tuple):
        raise TypeError(f"{name} must be a list or tuple of tensors, not {_described(sources)}: it is never stacked")
    if not sources:
        raise ValueError(f"{name} is empty; a read mixes at least one source")
    if len(sources) > MAX_SOURCES:
        raise ValueError(f"{name} holds {len(sources)} tensors; the limit is {MAX_SOURCES}")
    first: Any = sources[0]
    for position, source in enumerate(cast("Sequence[object]", sources)):
        check_like(cast("Tensor", source), first, f"{name}[{position}]", f"{name}[0]")
    if not first.ndim:
        raise ValueError(f"{name}[0] has no dimensions; it must be [..., D]")
    if not 0 < first.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{name}[0] has {first.shape[-1]} channels; they must be 1 to {MAX_WIDTH}")


def check_tensor(value: object, name: str) -> None:
    """Check for a floating-point tensor.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, not {_described(value)}")


def check_listed(value: object, name: str) -> None:
    """Check for a list or tuple; an iterator would be empty the second time.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} must be a list or tuple of tensors, not {_described(value)}")


def check_like(tensor: Tensor, other: Tensor, name: str, other_name: str) -> None:
    """Check that a tensor has the shape, dtype and device of another.

    Raises:
        TypeError: It is no floating-point tensor.
        ValueError: It has not.
    """
    check_tensor(tensor, name)
    for what in ("shape", "dtype", "device"):
        here, there = getattr(tensor, what), getattr(other, what)
        if here != there:
            here, there = (tuple(value) if what == "shape" else value for value in (here, there))
            raise ValueError(f"{name} has {what} {here}, {other_name} has {there}; they must agree")


def check_vector(vector: object, like: Tensor, name: str, key_rank: int | None = None) -> None:
    """Check a parameter [D] against a tensor [..., D], or one [key_rank].

    Raises:
        TypeError: It is not a floating-point tensor.
        ValueError: It is not [D], or lies on another device.
    """
    check_tensor(vector, name)
    assert isinstance(vector, Tensor)
    if key_rank is not None and vector.shape != (key_rank,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; key_rank={key_rank} needs ({key_rank},)")
    if key_rank is None and vector.shape != like.shape[-1:]:
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; the sources have {like.shape[-1]} channels")
    if vector.device != like.device:
        raise ValueError(f"{name} is on {vector.device}, the sources are on {like.device}; they must agree")


def check_scalars(eps: float, output: str) -> None:
    """Check the eps of the keys and the output form.

    Raises:
        TypeError: The eps is not a number.
        ValueError: One is out of its range.
    """
    check_number(eps, "eps")
    if not eps > 0:
        raise ValueError(f"eps={eps!r} must be positive: a source may be zero")
    if output not in ("sum", "mean"):
        raise ValueError(f"output={output!r} must be 'sum' or 'mean'")


def check_number(value: object, name: str) -> None:
    """Check for a Python number.

    Raises:
        TypeError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} must be a number")


def check_variant(num_heads: object, key_rank: object, recency_bias: object) -> None:
    """Check the variants of a read, whatever the width of its sources.

    Raises:
        TypeError: A count is not an integer, or the bias is not a number.
        ValueError: One is out of its range, or several heads are given with a key rank.
    """
    counts = {"num_heads": num_heads} if key_rank is None else {"num_heads": num_heads, "key_rank": key_rank}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} must be an integer")
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if num_heads != 1 and key_rank is not None:
        raise ValueError(
            f"num_heads={num_heads} and key_rank={key_rank} contradict: each head has its keys in its own channels, "
            "and sliced keys are the last channels; give one of them"
        )
    check_number(recency_bias, "recency_bias")
    assert isinstance(recency_bias, int | float)
    if not math.isfinite(recency_bias) or abs(recency_bias) > MAX_BIAS:
        raise ValueError(f"recency_bias={recency_bias!r} must be finite, and within {MAX_BIAS:g} of zero")


def check_variant_width(num_heads: int, key_rank: int | None, width: int, of: str) -> None:
    """Check the variants of a read of `width` channels; `of` names what has them.

    Raises:
        ValueError: The heads do not divide the channels, or there are fewer channels than the key rank.
    """
    if width % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide the {width} channels of {of}")
    if key_rank is not None and key_rank > width:
        raise ValueError(f"key_rank={key_rank} is more than the {width} channels of {of}")


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return type(value).__name__
