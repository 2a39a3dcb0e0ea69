"""Random numbers that follow from a key and a place, not from a generator's state.

    bits(i) = mix(mix(i xor a) + b),  a and b from the key and the number of the site,  i the position in the tensor

Whoever draws, in whatever order, on whatever device, eagerly or compiled, gets the same numbers: a network that is cut
into stages drops what the whole one drops. `mix` is a bijection of 32-bit words, two rounds of multiply and xor-shift
(the constants are the two-round ones of C. Wellons' hash-prospector, public domain); it is no cryptography.
A key is an integer tensor [] in [0, 2^32); one in host memory serves every device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _mix(word: Tensor) -> Tensor:
    # int64 holds every product: both constants are below 2^31
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _WORD
    return word ^ (word >> 15)


def make_key(seed: int, step: int, microbatch: int) -> Tensor:
    """Return the key [] of one microbatch of one step, in host memory."""
    words = torch.tensor([seed & _WORD, seed >> 32 & _WORD, step & _WORD, microbatch & _WORD], device="cpu")
    key = torch.zeros((), dtype=torch.int64, device="cpu")
    for word in words:
        key = _mix((_mix(key ^ word) + 0x5851F42D) & _WORD)
    return key


def keyed_bits(shape: Sequence[int], key: Tensor, site: int, device: torch.device | str) -> Tensor:
    """Return integers in [0, 2^32), int64, of the given shape."""
    first = _mix((key + (site * 0x9E3779B1 & _WORD)) & _WORD)
    second = _mix(first ^ 0x5BF03635)
    place = torch.arange(math.prod(shape), device=device, dtype=torch.int64)
    # beyond 2^32 positions the high word takes part as well
    place = (place & _WORD) ^ ((place >> 32) * 0x2545F491 & _WORD)
    return _mix((_mix(place ^ first) + second) & _WORD).reshape(tuple(shape))


def keyed_uniform(
    shape: Sequence[int] | Tensor,
    key: Tensor,
    site: int,
    device: torch.device | str,
    dtype: torch.dtype,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Return numbers in [low, high), from the 24 upper bits; `shape` may be a tensor of that shape.

    A dtype with fewer digits takes as many bits as it has, as torch's own: rounding would give `high`.
    """
    sizes = shape.shape if isinstance(shape, Tensor) else shape
    digits = min(24, 1 - int(math.log2(torch.finfo(dtype).eps)))
    fraction = (keyed_bits(sizes, key, site, device) >> (32 - digits)).to(torch.float64) * 2.0**-digits
    return (low + (high - low) * fraction).to(dtype)


def keyed_bernoulli(probability: Tensor | float, like: Tensor, key: Tensor, site: int) -> Tensor:
    """Return ones with the given probability, zeros else, in the shape and dtype of `like`."""
    bits = keyed_bits(like.shape, key, site, like.device)
    if isinstance(probability, Tensor):
        return (bits < probability.to(torch.float64) * 2.0**32).to(like.dtype)
    return (bits < round(probability * 2**32)).to(like.dtype)


def keyed_dropout(x: Tensor, p: float, key: Tensor, site: int, *, whole_channels: bool = False) -> Tensor:
    """Drop with probability `p` and scale by 1 / (1 - p), as torch's dropout; whole_channels as dropout2d and 3d."""
    shape = (*x.shape[:2], *(1 for _ in x.shape[2:])) if whole_channels else x.shape
    dropped = keyed_bits(shape, key, site, x.device) < round(p * 2**32)
    return x.masked_fill(dropped, 0.0) * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


def keyed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    draw_key: Tensor,
    site: int,
) -> Tensor:
    """Compute scaled dot-product attention with keyed dropout on its weights.

    A query that may look at nothing gets zeros, as from torch's. The weights [..., T, S] are materialised: fused
    attention draws from a generator of its own.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scores = query @ key.transpose(-2, -1) * (query.size(-1) ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    blind = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return keyed_dropout(weights.to(value.dtype), p, draw_key, site) @ value
