"""The probe of a read: query . (key * key_norm) = (query * key_norm) . key."""

import torch
from torch import Tensor


def probe_of(query: Tensor, key_norm: Tensor | None) -> Tensor:
    """Return query * key_norm [D] in float32."""
    probe = query.to(torch.float32)
    return probe if key_norm is None else probe * key_norm.to(torch.float32)
