"""Mirrors attnres_rewrite/kernels/inter_block/op.py and its kernels: outputs, gradients, sizes, strides, routing."""

from importlib import import_module

import numpy as np
import pytest
import torch

from attnres_rewrite.kernels.inter_block import op, reference, triton_backward
from attnres_rewrite.kernels.routes import reset_launches
from tests.kernels.budget import DEVICE, DTYPES, assert_within_twice_rounding, drawn, launched

pytestmark = pytest.mark.usefixtures("language")

# one stress a case (N, Q, D, ...): odd D, one source, many sources, many queries, no tokens, more tokens than a tile
SIZES = [
    (2, 3, 7, (3,)),
    (1, 3, 96, (2, 5)),
    (40, 1, 33, (2,)),
    (9, 24, 96, (2,)),
    (2, 3, 96, (0, 4)),
    (2, 1, 24, (70,)),
]


def inputs_of(num_sources, num_queries, width, leading, dtype=torch.float32):
    """Sources, queries, gains, in one list."""
    sources = [drawn(*leading, width, dtype=dtype, seed=n) for n in range(num_sources)]
    queries = [drawn(width, dtype=dtype, scale=width**-0.5, seed=300 + q) for q in range(num_queries)]
    return [*sources, *queries, *(drawn(width, dtype=dtype, seed=600 + q) for q in range(num_queries))]


def operations(num_sources, num_queries):
    """The kernels and the reference as functions of one list of inputs: Q mixes and Q log-sum-exps, in one list."""

    def over_list(inter_block):
        def operation(inputs):
            sources, parameters = inputs[:num_sources], inputs[num_sources:]
            # the factor of a read is the number of its sources, and one has the factor 1
            factors = [1.0 + 0.5 * q if num_sources > 1 else 1.0 for q in range(num_queries)]
            outs, lses = inter_block(sources, parameters[:num_queries], parameters[num_queries:], 1e-6, factors)
            return [*outs, *lses]

        return operation

    return over_list(op.inter_block_by_kernel), over_list(reference.inter_block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_sources", "num_queries", "width", "leading"), SIZES)
def test_outputs_and_every_gradient(num_sources, num_queries, width, leading, dtype):
    inputs = inputs_of(num_sources, num_queries, width, leading, dtype)
    assert_within_twice_rounding(*operations(num_sources, num_queries), inputs)


@pytest.mark.parametrize("dtype", DTYPES[-1:] if DEVICE == "cpu" else DTYPES, ids=str)
def test_rows_as_wide_as_those_of_a_big_model(dtype):
    assert_within_twice_rounding(*operations(3, 2), inputs_of(3, 2, 7168, (2,), dtype))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU does so itself")
def test_float32_products_are_summed_one_by_one(language, monkeypatch):
    """As a GPU's multiply-adds do; NumPy, of the interpreter, sums in parts, which loses less."""
    if language != "triton":
        pytest.skip("of Triton's matrix products")
    builder = import_module("triton.runtime.interpreter").InterpreterBuilder
    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, d, *_: type(d)(one_by_one(a, b, d), d.dtype))
    # the logits take long in the interpreter
    monkeypatch.setattr(op, "_logits_forward", logits_of)
    assert_within_twice_rounding(*operations(3, 2), inputs_of(3, 2, 7168, (1,)))


def logits_of(sources, probes, eps):
    rows = torch.stack(list(sources), 1)
    rstd = rows.square().mean(-1).add(eps).rsqrt()
    return rstd, (rows @ probes.T) * rstd[..., None]


def one_by_one(a, b, d):
    """d + a @ b of the interpreter's float32 values, every product added to one running sum."""
    products = a.data[:, None, :] * b.data.T[None, :, :]
    return np.cumsum(np.concatenate([d.data[..., None], products], -1), -1)[..., -1]


@pytest.mark.skipif(DEVICE != "cuda", reason="slow in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_sources", "num_queries", "width", "leading"), [(9, 24, 7168, (33,)), (40, 6, 768, (1000,))]
)
def test_sizes_for_a_gpu(num_sources, num_queries, width, leading, dtype):
    inputs = inputs_of(num_sources, num_queries, width, leading, dtype)
    assert_within_twice_rounding(*operations(num_sources, num_queries), inputs)


def test_programs_of_several_tokens_and_launches_of_several_groups(monkeypatch):
    monkeypatch.setattr(triton_backward, "MAX_PROGRAMS", 3)
    monkeypatch.setattr(op, "MAX_QUERIES", 2)
    assert_within_twice_rounding(*operations(2, 3), inputs_of(2, 3, 200, (10,)))


def test_no_gain_is_a_gain_of_one():
    inputs = inputs_of(3, 2, 20, (4,))
    found = op.inter_block_by_kernel(inputs[:3], inputs[3:5], None, 1e-6)
    expected = reference.inter_block(inputs[:3], inputs[3:5], None, 1e-6)
    torch.testing.assert_close(found, expected)


def test_the_mix_of_one_source_is_that_source():
    source, query, gain = inputs_of(1, 1, 20, (4,))
    outs, _ = op.inter_block_by_kernel([source], [query, query], [gain, gain], 1e-6)
    assert all(out is source for out in outs)


def test_any_leading_strides_without_a_copy():
    """Transposed, sliced, expanded and contiguous sources in one call."""
    shape = (4, 3, 5, 16)
    storages = [drawn(3, 4, 5, 16, seed=0), drawn(4, 3, 10, 16, seed=1), drawn(3, 1, 16, seed=2), drawn(*shape, seed=3)]

    def over_views(inter_block):
        def operation(inputs):
            transposed, sliced, expanded, plain, query = inputs
            sources = [transposed.transpose(0, 1), sliced[:, :, ::2], expanded.expand(shape), plain]
            outs, lses = inter_block(sources, [query], None, 1e-6)
            return [*outs, *lses]

        return operation

    inputs = [*storages, drawn(16, seed=4)]
    assert_within_twice_rounding(over_views(op.inter_block_by_kernel), over_views(reference.inter_block), inputs)


@pytest.mark.parametrize("used", [[1], [4], [0, 5]], ids=["one mix", "one lse", "a mix and another lse"])
def test_outputs_that_nobody_uses(used):
    kernel, meaning = operations(3, 3)
    inputs = inputs_of(3, 3, 20, (4,))
    chosen = [lambda given, run=run: [run(given)[position] for position in used] for run in (kernel, meaning)]
    assert_within_twice_rounding(*chosen, inputs)


def test_gradients_of_any_strides():
    kernel, meaning = operations(2, 2)
    inputs = inputs_of(2, 2, 20, (4, 3))

    def gradients(run):
        first, second, *lses = run(inputs)
        return torch.autograd.grad(first.sum() + (second.transpose(0, 1) * 2).sum() + sum(lses).sum(), inputs)

    torch.testing.assert_close(gradients(kernel), gradients(meaning))


def test_gradients_are_the_same_bits_in_every_run(monkeypatch):
    monkeypatch.setattr(triton_backward, "MAX_PROGRAMS", 5)
    kernel, _ = operations(3, 2)
    inputs = inputs_of(3, 2, 40, (12,), torch.float16)
    first, second = (
        torch.autograd.grad(sum(out.float().square().sum() for out in kernel(inputs)), inputs) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_propagates_as_in_the_reference(bad):
    kernel, meaning = operations(3, 2)
    inputs = inputs_of(3, 2, 20, (4,))
    with torch.no_grad():
        inputs[1][2, 5] = bad
    for ours, theirs in zip(kernel(inputs), meaning(inputs), strict=True):
        assert torch.equal(torch.isnan(ours), torch.isnan(theirs))
        assert torch.isnan(ours[2]).all()
        assert torch.isfinite(ours[[0, 1, 3]]).all()


def test_the_custom_ops_are_sound():
    *sources, first, second = inputs_of(3, 1, 20, (2, 2))
    probes = torch.stack([first, second]).detach().requires_grad_()
    scalars = torch.ops.attnres.inter_logits([source.detach() for source in sources], probes.detach(), 1e-6)
    torch.library.opcheck(
        torch.ops.attnres.inter_logits.default, ([s.detach() for s in sources], probes.detach(), 1e-6)
    )
    torch.library.opcheck(torch.ops.attnres.inter_block.default, (sources, probes, *scalars, [2.0] * len(probes)))
    torch.library.opcheck(
        torch.ops.attnres.inter_block_without_grad.default,
        ([s.detach() for s in sources], probes.detach(), 1e-6, [2.0] * 2),
    )
    torch.library.opcheck(torch.ops.attnres.inter_block_of_one.default, (sources[0], probes, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradients_the_values_are_the_same(dtype):
    kernel, _ = operations(3, 5)
    inputs = inputs_of(3, 5, 33, (2, 7), dtype)
    with torch.no_grad():
        found = kernel(inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, kernel(inputs), strict=True))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("num_sources", [1, 3])
def test_compiled_gradients_are_those_of_eager(num_sources):
    kernel, _ = operations(num_sources, 2)
    inputs = inputs_of(num_sources, 2, 20, (4,))
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager", dynamic=True)
    ours, theirs = (
        torch.autograd.grad(sum(out.square().sum() for out in run(inputs)), inputs) for run in (compiled, kernel)
    )
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_launches_are_counted_and_a_cpu_runs_plain_pytorch():
    reset_launches()
    kernel, _ = operations(2, 1)
    inputs = inputs_of(2, 1, 20, (4,))
    torch.autograd.grad(sum(out.sum() for out in kernel(inputs)), inputs)
    assert launched() == {"inter_block.logits": 1, "inter_block.forward": 1, "inter_block.backward": 1}
    first, second, query, gain = (value.cpu() for value in inputs)
    op.inter_block([first, second], [query], [gain], 1e-6)
    assert launched()["inter_block: plain (cpu)"] == 1


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_gpu_runs_the_kernels():
    reset_launches()
    *sources, query, gain = inputs_of(3, 1, 20, (4,))
    op.inter_block(sources, [query], [gain], 1e-6)
    assert launched() == {"inter_block.logits": 1, "inter_block.forward": 1}
