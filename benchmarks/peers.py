"""Public kernels for the read, each called as its documentation says: what the benchmarks time beside our own.

Versions: fla-core 0.6.0, liger-kernel 0.8.5, fast-attnres 2.1.0, flash-attn-res 0.1.12. They run on a GPU only. A
function of this page fails with ImportError where a package is missing; what a kernel refuses, it says itself.
"""

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6
# (sources [..., D] or their stack, query [D], gain of the key norm [D], weight of the norm behind or None) -> [..., D]
Read = Callable[[Sequence[Tensor] | Tensor, Tensor, Tensor, Tensor | None], Tensor]


def rms_norm(value: Tensor, weight: Tensor | None) -> Tensor:
    """Return the norm behind a read, or the value where there is none."""
    return value if weight is None else functional.rms_norm(value, weight.shape, weight, EPS)


def fla_core() -> Read:
    attnres = importlib.import_module("fla.ops.attnres").fused_attnres

    def read(sources: Sequence[Tensor] | Tensor, query: Tensor, gain: Tensor, weight: Tensor | None) -> Tensor:
        dtype = sources[0].dtype
        return attnres(query.to(dtype), sources, gain.to(dtype), output_rms_weight=weight, rms_eps=EPS)

    return read


def liger_kernel() -> Read:
    attn_res = importlib.import_module("liger_kernel.ops.attn_res").LigerAttnResFunction.apply

    def read(sources: Sequence[Tensor] | Tensor, query: Tensor, gain: Tensor, weight: Tensor | None) -> Tensor:
        values = sources if isinstance(sources, Tensor) else torch.stack(list(sources))
        dtype = values.dtype
        return rms_norm(attn_res(values, query.to(dtype), gain.to(dtype), EPS), weight)

    return read


def fast_attnres() -> Read:
    attnres = importlib.import_module("attnres").attnres

    def read(sources: Sequence[Tensor] | Tensor, query: Tensor, gain: Tensor, weight: Tensor | None) -> Tensor:
        # its keys have no gain: the query takes it
        return rms_norm(attnres(list(sources), (query * gain).to(sources[0].dtype), eps=EPS), weight)

    return read


READS: dict[str, Callable[[], Read]] = {
    "fla-core": fla_core,
    "liger-kernel": liger_kernel,
    "fast-attnres": fast_attnres,
}

# (finished sources as one stack [N, T, D], queries, gains) -> what each query reads of them, and each log-sum-exp
Phase1 = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]
# (partial sum [T, D], query, gain, what it reads of the finished sources, log-sum-exp) -> [T, D]
Phase2 = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def flash_attn_res() -> tuple[Phase1, Phase2]:
    """Return both phases, for a D that is a power of two."""
    package = importlib.import_module("flash_attn_res")

    def phase_1(
        stacked: Tensor, queries: Sequence[Tensor], gains: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        # its keys have no gain, either
        probes = torch.stack([query * gain for query, gain in zip(queries, gains, strict=True)])
        return package.phase_1_batched_attention_triton_op(stacked.unsqueeze(1), probes.to(stacked.dtype), EPS)

    def phase_2(partial: Tensor, query: Tensor, gain: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        probe = (query * gain).to(partial.dtype)
        return package.phase_2_online_softmax_merge_triton_op(partial.unsqueeze(0), probe, out, lse, EPS)[0]

    return phase_1, phase_2
