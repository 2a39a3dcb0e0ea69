"""Mirrors attnres_rewrite/kernels/merge/op.py and its kernels: outputs, gradients, sizes, strides, routing."""

from itertools import product

import pytest
import torch

from attnres_rewrite.kernels.merge import op, reference
from attnres_rewrite.kernels.routes import reset_launches
from tests.kernels.budget import DEVICE, DTYPES, assert_within_twice_rounding, drawn, launched, run

pytestmark = pytest.mark.usefixtures("language")

# one stress a case: odd D, leading dimensions, a row as wide as a big model's, no tokens, one token, many tokens.
# The gradient of lse has one value a token: fewer tokens would compare the luck of a few roundings
SIZES = [(7, (61,)), (96, (2, 9)), (7168, (6,)), (96, (0, 4)), (1024, (1,)), (24, (1000,))]
EPS = {"eps": 1e-6, "factor": 9.0}


def kernel(inputs):
    return [op.merge_by_kernel(*inputs, **EPS)]


def by_reference(inputs):
    return [reference.merge(*inputs, **EPS)]


def inputs_of(width, leading, dtype):
    """inter_out, lse, partial, query and gain."""
    inter_out, partial = (drawn(*leading, width, dtype=dtype, seed=s) for s in range(2))
    return [inter_out, drawn(*leading, seed=2), partial, drawn(width, scale=width**-0.5, seed=3), drawn(width, seed=4)]


def fused(run, norm="rms", update=True, weight=True, bias=False, norm_eps=1e-5):
    """add_merge_norm as an operation on the inputs that these flags leave."""

    def operation(inputs):
        rest = list(inputs)
        rows = [rest.pop(0), rest.pop(0) if update else None, *(rest.pop(0) for _ in range(4))]
        vectors = [rest.pop(0) if flag else None for flag in (weight, bias)]
        return run(*rows, *vectors, norm_eps, **EPS, norm=norm)

    return operation


def fused_inputs_of(width, leading, dtype, update=True, weight=True, bias=False):
    inter_out, lse, partial, query, gain = inputs_of(width, leading, dtype)
    updates = [drawn(*leading, width, dtype=dtype, seed=5)] * update
    vectors = [drawn(width, dtype=dtype, seed=6)] * weight + [drawn(width, dtype=dtype, seed=7)] * bias
    return [partial, *updates, inter_out, lse, query, gain, *vectors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "leading"), SIZES)
def test_merge_and_every_gradient(width, leading, dtype):
    assert_within_twice_rounding(kernel, by_reference, inputs_of(width, leading, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "leading"), SIZES)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_add_merge_norm_and_every_gradient(norm, width, leading, dtype):
    flags = {"bias": norm == "layer"}
    ours, theirs = (fused(run, norm, **flags) for run in (op.add_merge_norm_by_kernel, reference.add_merge_norm))
    assert_within_twice_rounding(ours, theirs, fused_inputs_of(width, leading, dtype, **flags))


@pytest.mark.parametrize(("norm", "update", "weight", "bias"), [*product(["rms", "layer"], *[[False, True]] * 3)])
def test_every_combination_of_what_may_be_missing(norm, update, weight, bias):
    flags = {"update": update, "weight": weight, "bias": bias}
    ours, theirs = (fused(run, norm, **flags) for run in (op.add_merge_norm_by_kernel, reference.add_merge_norm))
    assert_within_twice_rounding(ours, theirs, fused_inputs_of(20, (40,), torch.float32, **flags))


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("used", [0, 1])
def test_only_one_of_the_two_outputs_is_used(used, update):
    inputs = fused_inputs_of(20, (40,), torch.float32, update=update)
    ours, theirs = (
        lambda inputs, run=run: [fused(run, update=update)(inputs)[used]]
        for run in (op.add_merge_norm_by_kernel, reference.add_merge_norm)
    )
    assert_within_twice_rounding(ours, theirs, inputs)


def test_without_an_update_the_partial_sum_itself_is_handed_on():
    inputs = fused_inputs_of(20, (4,), torch.float32, update=False)
    assert fused(op.add_merge_norm_by_kernel, update=False)(inputs)[0] is inputs[0]


def test_no_eps_of_the_norm_is_that_of_float32():
    """As in torch.nn.functional.rms_norm; the rows are small enough to see it."""
    inputs = fused_inputs_of(20, (40,), torch.float32)
    with torch.no_grad():
        for rows in inputs[:3]:
            rows *= 1e-5
    ours, theirs = (
        fused(run, norm_eps=eps)(inputs)[1]
        for run, eps in [(op.add_merge_norm_by_kernel, None), (reference.add_merge_norm, 2**-23)]
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_gain_and_a_query_of_another_dtype():
    inter_out, lse, partial, query, gain = inputs_of(20, (40,), torch.float32)
    inputs = [inter_out, lse, partial, query.detach().half().requires_grad_(), gain]
    assert_within_twice_rounding(kernel, by_reference, inputs)
    assert_within_twice_rounding(
        lambda rows: [op.merge_by_kernel(*rows, None, **EPS)],
        lambda rows: [reference.merge(*rows, None, **EPS)],
        inputs[:4],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_log_sum_exp_of_another_dtype(dtype):
    inputs, fused_inputs = inputs_of(20, (40,), torch.float32), fused_inputs_of(20, (40,), torch.float32)
    inputs[1] = fused_inputs[3] = inputs[1].detach().to(dtype).requires_grad_()
    assert_within_twice_rounding(kernel, by_reference, inputs)
    assert_within_twice_rounding(fused(op.add_merge_norm_by_kernel), fused(reference.add_merge_norm), fused_inputs)


def test_any_strides():
    """Transposed, sliced and expanded rows, vectors that are columns, and gradients that are not contiguous."""
    storages = [
        drawn(6, 4, 5, 16, seed=0),
        drawn(4, 6, 10, 16, seed=1),
        drawn(6, 1, 16, seed=2),
        drawn(5, 6, 4, seed=3),
    ]
    vectors = [drawn(16, 2, seed=4), drawn(16, 2, seed=5)]

    def views(inputs):
        transposed, sliced, expanded, lse, query, weight = inputs
        rows = transposed.transpose(0, 1), sliced[:, :, ::2], expanded.expand(4, 6, 5, 16)
        return [*rows, lse.permute(2, 1, 0), query[:, 0], None, weight[:, 1]]

    def through(run):
        outputs = lambda inputs: run(*views(inputs), None, 1e-5, **EPS, norm="rms")  # noqa: E731
        return lambda inputs: [out.transpose(0, 1) for out in outputs(inputs)]

    assert_within_twice_rounding(
        through(op.add_merge_norm_by_kernel), through(reference.add_merge_norm), [*storages, *vectors]
    )


def test_a_program_sums_over_many_tiles(monkeypatch):
    monkeypatch.setattr("attnres_rewrite.kernels.merge.triton_backward.MAX_PROGRAMS", 3)
    ours, theirs = (fused(run, "layer", bias=True) for run in (op.add_merge_norm_by_kernel, reference.add_merge_norm))
    assert_within_twice_rounding(ours, theirs, fused_inputs_of(24, (1000,), torch.float32, bias=True))


def test_gradients_are_the_same_bits_in_every_run():
    inputs = fused_inputs_of(40, (700,), torch.float16, bias=True)
    operation = fused(op.add_merge_norm_by_kernel, "layer", bias=True)
    losses = [sum(out.float().square().sum() for out in operation(inputs)) for _ in range(2)]
    first, second = (torch.autograd.grad(loss, inputs) for loss in losses)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy, of the interpreter
@pytest.mark.parametrize("position", [0, 1, 2], ids=["partial", "update", "inter_out"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_propagates_as_in_the_reference(bad, position):
    inputs = fused_inputs_of(20, (4,), torch.float32, bias=True)
    with torch.no_grad():
        inputs[position][2, 5] = bad
    ours, theirs = (
        fused(run, "layer", bias=True)(inputs) for run in (op.add_merge_norm_by_kernel, reference.add_merge_norm)
    )
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(torch.isnan(found), torch.isnan(expected))
        assert torch.equal(torch.isinf(found), torch.isinf(expected))
        assert torch.isfinite(found[[0, 1, 3]]).all()
    assert torch.isnan(ours[1][2]).all()


@pytest.mark.parametrize("logit_minus_lse", [80.0, -80.0])
def test_both_shares_are_exact_when_tiny(logit_minus_lse):
    ones, zeros = torch.ones(3, 8, device=DEVICE), torch.zeros(3, 8, device=DEVICE)
    lse = torch.full((3,), -logit_minus_lse, device=DEVICE)
    rows = (ones, lse, zeros) if logit_minus_lse > 0 else (zeros, lse, ones)
    small = op.merge_by_kernel(*rows, zeros[0], None, 1e-6, 1.0)
    # a GPU takes exp by a power of two, whose exponent of 115 is good to 4e-6
    expected = torch.full((3, 8), -80.0, dtype=torch.float64, device=DEVICE).exp()
    torch.testing.assert_close(small.double(), expected, rtol=1e-5 if DEVICE == "cuda" else 1e-6, atol=0)


@pytest.mark.parametrize(("norm", "update"), [("none", False), ("layer", True)])
def test_the_custom_op_is_sound(norm, update):
    partial, added, inter_out, lse, query, _, weight, bias = fused_inputs_of(20, (2, 4), torch.float32, bias=True)
    rows = (partial, added if update else None, inter_out, lse, query)
    vectors = (None, None) if norm == "none" else (weight, bias)
    torch.library.opcheck(torch.ops.attnres.merge.default, (*rows, *vectors, norm, 1e-5, 1e-6, 9.0))


@pytest.mark.parametrize("update", [False, True])
def test_a_compiled_graph_gives_the_same_bits(update):
    inputs = fused_inputs_of(20, (2, 4), torch.float32, update=update, bias=True)
    operation = fused(op.add_merge_norm_by_kernel, "layer", update=update, bias=True)

    def loss(inputs):
        total, normed = operation(inputs)
        return (total.square() + normed.square()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(run(inputs), inputs) for run in (compiled, loss))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_launches_are_counted_and_a_cpu_runs_plain_pytorch():
    reset_launches()
    inputs, fused_inputs = inputs_of(20, (4,), torch.float32), fused_inputs_of(20, (4,), torch.float32)
    torch.autograd.grad(kernel(inputs)[0].sum(), inputs)
    total, normed = fused(op.add_merge_norm_by_kernel)(fused_inputs)
    torch.autograd.grad(normed.sum(), fused_inputs, retain_graph=True)
    # the sum alone hands its gradient on: nothing is launched
    torch.autograd.grad(total.sum(), fused_inputs[:2])
    kernels = ("merge.forward", "merge.backward", "add_merge_norm.forward", "add_merge_norm.backward")
    assert launched() == dict.fromkeys(kernels, 1)
    op.merge(*(value.cpu() for value in inputs), 1e-6, 9.0)
    fused(op.add_merge_norm)([value.cpu() for value in fused_inputs])
    assert launched()["merge: plain (cpu)"] == launched()["add_merge_norm: plain (cpu)"] == 1


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_gpu_runs_the_kernels():
    reset_launches()
    op.merge(*inputs_of(20, (4,), torch.float32), 1e-6, 9.0)
    fused(op.add_merge_norm)(fused_inputs_of(20, (4,), torch.float32))
    assert launched() == {"merge.forward": 1, "add_merge_norm.forward": 1}


def test_an_update_of_autocast_has_another_dtype():
    """The partial sum keeps its own; the update's gradient comes back in the update's."""
    partial, inter_out = (drawn(6, 20, seed=seed) for seed in range(2))
    update, lse, query = drawn(6, 20, dtype=torch.float16, seed=2), drawn(6, seed=3), drawn(20, seed=4)
    inputs = [partial, update, inter_out, lse, query]

    def through(operation):
        return lambda given: list(operation(*given, None, None, None, 1e-6, 1e-6, 2.0, "rms"))

    ours, theirs = (
        run(through(operation), inputs) for operation in (op.add_merge_norm_by_kernel, reference.add_merge_norm)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
