"""Mirrors attnres_rewrite/kernels/cpu_library.py: how the kernels for a CPU are chosen, compiled and called."""

import pytest
import torch

from attnres_rewrite import functional
from attnres_rewrite.kernels import cpu_library
from attnres_rewrite.kernels.inter_block import cpu
from attnres_rewrite.kernels.routes import launches, reset_launches

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def read_of(sources, query):
    return functional.attn_res_read(sources, query)


def inputs_of(dtype=torch.float32):
    return [torch.randn(5, 24, dtype=dtype) for _ in range(3)], torch.randn(24)


def compiled(dtype, backend="aot_eager"):
    torch._dynamo.reset()
    reset_launches()
    inputs = inputs_of(dtype)
    out = torch.compile(read_of, fullgraph=True, backend=backend)(*inputs)
    torch.testing.assert_close(out, read_of(*inputs))
    return launches()


@pytest.mark.parametrize("dtype", cpu_library.SCALARS, ids=str)
def test_a_compiled_read_runs_in_cpp(dtype):
    assert compiled(dtype)["read.forward (C++)"] == 1


def test_inductor_calls_the_kernel():
    assert compiled(torch.bfloat16, "inductor")["read.forward (C++)"] == 1


def test_few_rows_are_one_thread_s():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        found = [cpu_library.num_threads(*size) for size in [(0, 768), (1, 16384), (2, 768), (8, 768), (1024, 768)]]
    finally:
        torch.set_num_threads(before)
    assert found == [1, 1, 1, 3, 4]


def test_float64_is_plain():
    assert "read.forward (C++)" not in compiled(torch.float64)


def test_an_exported_program_needs_nothing_of_ours():
    class Read(torch.nn.Module):
        def forward(self, sources, query):
            return read_of(sources, query)

    program = torch.export.export(Read(), inputs_of())
    assert not any("attnres" in str(node.target) for node in program.graph.nodes)


def test_without_a_compiler_reads_are_plain(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert not cpu_library.prepare(torch.float32)
    assert "read.forward (C++)" not in compiled(torch.float32)


def test_code_that_does_not_compile_is_an_error(monkeypatch):
    from torch._inductor import exc

    monkeypatch.setitem(cpu_library.SCALARS, torch.float32, "no_such_type")
    cpu_library.library.cache_clear()
    try:
        with pytest.raises(exc.CppCompileError, match="no_such_type"):
            cpu.logits_forward([torch.randn(2, 8)], torch.randn(1, 8), 1e-6)
    finally:
        cpu_library.library.cache_clear()


def test_gradients_are_the_same_bits_for_any_number_of_threads():
    sources, probes = [torch.randn(500, 24) for _ in range(3)], torch.randn(2, 24)
    rstd, logit = cpu.logits_forward(sources, probes, 1e-6)
    grads = [torch.randn(500, 24) for _ in range(2)]
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        dsources, dprobes = cpu.inter_block_backward(grads, None, sources, probes, rstd, logit, [1.0, 1.0])
        found.append([*dsources, dprobes])
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_partial_sums_of_a_gradient_are_bounded():
    assert cpu_library.num_chunks(3, torch.empty(2, 8)) == 3
    assert cpu_library.num_chunks(10_000, torch.empty(2, 8)) == cpu_library.MAX_CHUNKS
    assert cpu_library.num_chunks(10_000, torch.empty(200, 16384)) == 5
    assert cpu_library.num_chunks(0, torch.empty(2, 8)) == 0
