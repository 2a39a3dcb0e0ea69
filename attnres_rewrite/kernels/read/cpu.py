"""A read by the C++ kernels of phase 1, with one query."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_rewrite.kernels.cpu_library import address, call, floats, pointers, rows_argument
from attnres_rewrite.kernels.inter_block.cpu import MixArguments, mix_backward
from attnres_rewrite.kernels.routes import count
from attnres_rewrite.kernels.rows import rows_of


def read_forward(sources: Sequence[Tensor], probe: Tensor, eps: float, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mix times `factor` [..., D], float32 rstd [T, S] and logits [T, S]; as triton_forward does."""
    rows, width = rows_of(sources), sources[0].shape[-1]
    out = torch.empty_like(sources[0], memory_format=torch.contiguous_format)
    rstd, logit = (probe.new_empty(rows.num_rows, len(sources)) for _ in range(2))
    count("read.forward (C++)")
    sizes = rows.num_rows, len(sources), 1, width
    call("mix", sources[0].dtype, MixArguments(
        rows_argument(sources, rows), address(probe), address(rstd), address(logit), pointers([out]), None, *sizes,
        eps, floats([factor]),
    ))  # fmt: skip
    return out, rstd, logit


def read_backward(
    grad: Tensor, sources: Sequence[Tensor], probe: Tensor, rstd: Tensor, logit: Tensor, factor: float
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of the sources and of the probe; see triton_backward.read_backward."""
    count("read.backward (C++)")
    dsources, dprobes = mix_backward([grad], None, sources, probe.unsqueeze(0), rstd, logit.unsqueeze(-1), [factor])
    return dsources, dprobes[0]
