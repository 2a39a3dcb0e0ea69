"""Mirrors attnres_rewrite/passes/match_norm.py: spellings of a norm, and what is none."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attnres_rewrite.fxgraph import op_name
from attnres_rewrite.passes.match_norm import Norm, match_norm

WIDTH = 8


class Reading(nn.Module):
    """A value that `step` reads."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(torch.neg(x), self.weight)


def matched(
    step: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32
) -> tuple[Norm | str, fx.Graph]:
    example = torch.rand(2, 3, WIDTH, dtype=dtype)
    graph = torch.export.export(Reading(step).to(dtype), (example,), strict=False).module().graph
    value = next(node for node in graph.nodes if op_name(node) == "neg")
    return match_norm(value), graph


def llama(x, w):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return w * wide.to(x.dtype)


def gemma(x, w):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (wide * (1.0 + w.float())).type_as(x)


def t5(x, w):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + 1e-5))


SPELLINGS = {
    "torch rms": (lambda x, w: F.rms_norm(x, (WIDTH,), w, 1e-5), "rms"),
    "torch layer": (lambda x, w: F.layer_norm(x, (WIDTH,), w, w, 1e-5), "layer"),
    "layer without weight": (lambda x, w: F.layer_norm(x, (WIDTH,)), "layer"),
    "llama": (llama, "rms"),
    "gemma": (gemma, "rms"),
    "square": (lambda x, w: w * (x * torch.rsqrt(x.square().mean(2, True) + 1e-5)), "rms"),
    "x * x": (lambda x, w: torch.rsqrt((x * x).mean(-1, True) + 1e-5) * x * w, "rms"),
    "no weight": (lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5), "rms"),
}


@pytest.mark.parametrize(("step", "kind"), SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_that_are_recognised(step, kind):
    norm, graph = matched(step)
    assert isinstance(norm, Norm)
    assert norm.kind == kind
    assert norm.eps == 1e-5
    output = next(node for node in graph.nodes if node.op == "output")
    assert norm.end in output.all_input_nodes


@pytest.mark.parametrize("step", [llama, gemma])
def test_casts_to_float32_belong_to_the_norm(step):
    norm, graph = matched(step, torch.bfloat16)
    assert isinstance(norm, Norm)
    output = next(node for node in graph.nodes if node.op == "output")
    assert norm.end in output.all_input_nodes
    assert norm.weight is not None
    assert tuple(norm.weight.meta["val"].shape) == (WIDTH,)


def test_the_default_eps_of_torch_is_kept_as_none():
    norm, _ = matched(lambda x, w: F.rms_norm(x, (WIDTH,), w))
    assert isinstance(norm, Norm)
    assert norm.eps is None


REFUSED = {
    "two readers": (lambda x, w: F.rms_norm(x, (WIDTH,), w) + x, "2 consumers read it"),
    "a linear": (lambda x, w: F.linear(x, w.expand(4, WIDTH)), "read by linear"),
    "over two axes": (lambda x, w: F.layer_norm(x, (3, WIDTH)), "not over the channels alone"),
    "another axis": (lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, True) + 1e-5), "not as one norm"),
    "a cube": (lambda x, w: x * torch.rsqrt(x.pow(3).mean(-1, True) + 1e-5), "not as one norm"),
    "eps is learned": (lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, True) + w), "not as one norm"),
    "the mean square goes on": (lambda x, w: _mean_square_used(x), "not as one norm"),
}


def _mean_square_used(x):
    mean = x.pow(2).mean(-1, True)
    return x * torch.rsqrt(mean + 1e-5) + mean


@pytest.mark.parametrize(("step", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_norm_of_the_value_alone(step, reason):
    found, _ = matched(step)
    assert isinstance(found, str)
    assert reason in found


def test_a_weight_made_of_activations_is_left_alone():
    found, _ = matched(lambda x, w: F.layer_norm(x, (WIDTH,), torch.sigmoid(w) * 2))
    assert found == "its weight or bias is worked out from activations"


def test_a_norm_in_lower_precision_is_left_alone():
    found, _ = matched(llama, torch.float64)
    assert found == "the norm works in a lower precision than it reads"


def test_a_result_in_another_dtype_is_left_alone():
    found, _ = matched(lambda x, w: w.float() * llama(x, w).float(), torch.bfloat16)
    assert isinstance(found, Norm)  # the norm ends before the cast
    found, _ = matched(lambda x, w: x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-5), torch.bfloat16)
    assert isinstance(found, str)


def test_t5_reads_the_value_beside_its_float32_copy():
    """In float32 both are one value; in bfloat16 the product is taken in another precision, so it is left alone."""
    found, _ = matched(t5, torch.bfloat16)
    assert isinstance(found, str)
