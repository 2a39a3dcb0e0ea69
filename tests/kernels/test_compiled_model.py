"""A rewritten model under torch.compile on a CPU: C++ kernels between the kernels of Inductor."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import attnres_rewrite as ar
from attnres_rewrite.kernels.routes import launches, reset_launches
from tests.networks import VOCAB, WIDTH, Gpt

pytestmark = [pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"), pytest.mark.timeout(600)]


def rewritten() -> ar.RewrittenModule:
    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB, (2, 6))
    new = ar.rewrite(Gpt(depth=4).eval(), (ids,), config=ar.AttnResConfig(num_blocks=3), verify=False)
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            # logits of about one: sharper mixes would magnify every rounding
            parameter.add_(WIDTH**-0.5 * torch.randn_like(parameter))
    return new


def results(run, model, ids):
    """Return the output and all gradients, each as one vector in float64."""
    for parameter in model.parameters():
        parameter.grad = None
    out = run(ids)
    out.square().mean().backward()
    gradients = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])
    return out.detach().double().flatten(), gradients


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_outputs_and_gradients_within_twice_rounding_at_any_length(backend):
    model = rewritten()
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    reset_launches()
    batches = [torch.randint(0, VOCAB, (8, length)) for length in (6, 9, 5, 7)]
    found, rounded, truth = (
        [torch.cat(values) for values in zip(*(results(run, of, ids) for ids in batches), strict=True)]
        for run, of in ((compiled, model), (model, model), (exact, exact))
    )
    assert {"add_merge_norm.forward (C++)", "inter_block.backward (C++)"} <= launches().keys()
    for ours, theirs, value in zip(found, rounded, truth, strict=True):
        error, rounding = ((each - value).norm() for each in (ours, theirs))
        assert error <= 2 * rounding + torch.finfo(torch.float32).eps * value.norm()


def test_under_autocast_they_compute_what_plain_pytorch_does():
    """By aot_eager, since Inductor rounds to bfloat16 in other places than eager PyTorch."""
    model = rewritten()
    ids = torch.randint(0, VOCAB, (2, 6))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    reset_launches()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(ids), model(ids))
    assert "add_merge_norm.forward (C++)" in launches()


@pytest.mark.parametrize("schedule", ["direct", "two_phase"])
def test_sizes_are_dynamic_from_the_second_on(schedule):
    config = ar.AttnResConfig(block_size=3, schedule=schedule)
    example = torch.zeros(2, 6, dtype=torch.long)
    model = ar.rewrite(Gpt(depth=2).eval(), (example,), config=config, verify=False)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch, length in ((2, 6), (3, 7), (4, 9)):
        compiled(torch.zeros(batch, length, dtype=torch.long))
    assert counter.frame_count == 2
