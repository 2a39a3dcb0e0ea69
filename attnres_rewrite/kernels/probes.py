"""The probe of a read: query . (key * key_norm) = (query * key_norm) . key."""

import torch
from torch import Tensor


def probe_of(query: Tensor, key_norm: Tensor | None) -> Tensor:
    """Return query * key_norm [D] in float32, contiguous: kernels take it as it lies in memory."""
    probe = query.to(torch.float32)
    if key_norm is not None:
        probe = probe * key_norm.to(torch.float32)
    return probe.contiguous()
