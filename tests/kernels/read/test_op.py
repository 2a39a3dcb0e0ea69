"""Mirrors attnres_rewrite/kernels/read/op.py and its kernels: outputs, gradients, sizes, strides, routing."""

import pytest
import torch

from attnres_rewrite.kernels.read import op, reference
from attnres_rewrite.kernels.routes import reset_launches
from tests.kernels.budget import DEVICE, DTYPES, assert_within_twice_rounding, drawn, launched

pytestmark = pytest.mark.usefixtures("language")

# one stress a case: odd D, one source, many sources, a row as wide as a big model's, no tokens, many tokens; with few
# tokens, forty gradients would compare the luck of a few roundings
SIZES = [(2, 7, (3,)), (1, 96, (2, 5)), (40, 33, (50,)), (9, 7168, (2,)), (2, 96, (0, 4)), (3, 24, (1000,))]


def kernel(inputs, output="sum"):
    *sources, query, gain = inputs
    return [op.read_by_kernel(sources, query, gain, 1e-6, output)[0]]


def by_reference(inputs, output="sum"):
    *sources, query, gain = inputs
    return [reference.block_attn_res(sources, query, gain, 1e-6, output)]


def inputs_of(num_sources, width, leading, dtype):
    sources = [drawn(*leading, width, dtype=dtype, seed=s) for s in range(num_sources)]
    return [*sources, drawn(width, scale=width**-0.5, seed=100), drawn(width, seed=101)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_sources", "width", "leading"), SIZES)
def test_output_and_every_gradient(num_sources, width, leading, dtype):
    assert_within_twice_rounding(kernel, by_reference, inputs_of(num_sources, width, leading, dtype))


def test_mean_is_the_mix_itself():
    inputs = inputs_of(5, 20, (4,), torch.float32)
    torch.testing.assert_close(kernel(inputs, "mean")[0], by_reference(inputs, "mean")[0])


def test_weights_are_the_softmax():
    *sources, query, gain = inputs_of(4, 20, (2, 3), torch.float32)
    out, weights = op.read_by_kernel(sources, query, gain, 1e-6, "mean")
    mixed = (torch.stack(sources, -1) * weights.unsqueeze(-2)).sum(-1)
    torch.testing.assert_close(mixed, out)
    assert weights.shape == (2, 3, 4)
    assert not weights.requires_grad


def test_any_leading_strides_without_a_copy():
    """Transposed, sliced, expanded and contiguous sources in one call."""
    shape = (4, 6, 5, 16)
    storages = [drawn(6, 4, 5, 16, seed=0), drawn(4, 6, 10, 16, seed=1), drawn(6, 1, 16, seed=2), drawn(*shape, seed=3)]

    def views(inputs):
        transposed, sliced, expanded, plain, query = inputs
        return [transposed.transpose(0, 1), sliced[:, :, ::2], expanded.expand(shape), plain], query

    def through_kernel(inputs):
        sources, query = views(inputs)
        return [op.read_by_kernel(sources, query, None, 1e-6, "sum")[0]]

    def through_reference(inputs):
        sources, query = views(inputs)
        return [reference.block_attn_res(sources, query, None, 1e-6, "sum")]

    assert_within_twice_rounding(through_kernel, through_reference, [*storages, drawn(16, seed=4)])


def test_a_program_sums_over_many_tiles(monkeypatch):
    from attnres_rewrite.kernels.read import triton_backward

    monkeypatch.setattr(triton_backward, "MAX_PROGRAMS", 3)
    assert_within_twice_rounding(kernel, by_reference, inputs_of(3, 700, (25,), torch.float32))


def test_a_query_may_be_a_column_of_a_matrix():
    *sources, _, _ = inputs_of(3, 20, (6,), torch.float32)
    columns = drawn(20, 3, seed=7)

    def through(operation):
        return lambda inputs: [operation(inputs[:-1], inputs[-1][:, 1])]

    assert_within_twice_rounding(
        through(lambda sources, query: op.read_by_kernel(sources, query, None, 1e-6, "sum")[0]),
        through(lambda sources, query: reference.block_attn_res(sources, query, None, 1e-6, "sum")),
        [*sources, columns],
    )


def test_gradients_are_the_same_bits_in_every_run():
    inputs = inputs_of(3, 40, (700,), torch.float16)
    first, second = (torch.autograd.grad(kernel(inputs)[0].float().square().sum(), inputs) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_propagates_as_in_the_reference(bad):
    inputs = inputs_of(3, 20, (4,), torch.float32)
    with torch.no_grad():
        inputs[1][2, 5] = bad
    ours, theirs = kernel(inputs)[0], by_reference(inputs)[0]
    assert torch.equal(torch.isnan(ours), torch.isnan(theirs))
    assert torch.isnan(ours[2]).all()
    assert torch.isfinite(ours[[0, 1, 3]]).all()


def test_the_custom_op_is_sound():
    *sources, query, _ = inputs_of(3, 20, (2, 4), torch.float32)
    torch.library.opcheck(torch.ops.attnres.read.default, (sources, query, 1e-6, 3.0))


def test_launches_are_counted_and_a_cpu_runs_plain_pytorch():
    reset_launches()
    inputs = inputs_of(3, 20, (4,), torch.float32)
    torch.autograd.grad(kernel(inputs)[0].sum(), inputs)
    assert launched() == {"read.forward": 1, "read.backward": 1}
    *sources, query, gain = (value.cpu() for value in inputs)
    op.block_attn_res(sources, query, gain, 1e-6, "sum")
    assert launched()["read: plain (cpu)"] == 1


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_gpu_runs_the_kernel_and_says_when_it_cannot():
    reset_launches()
    *sources, query, gain = inputs_of(3, 20, (4,), torch.float32)
    op.block_attn_res(sources, query, gain, 1e-6, "sum")
    assert launched() == {"read.forward": 1}
    with pytest.warns(UserWarning, match="float64"):
        op.block_attn_res([s.double() for s in sources], query, gain, 1e-6, "sum")
