"""Mirrors attnres_rewrite/passes/fuse_reads.py."""

import pytest
import torch
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.kernels.merge.op import add_merge_norm, merge
from attnres_rewrite.module import RewrittenModule
from tests.networks import WIDTH, Gpt, Layer, gpt, gpt_of, ids


def rewrite(model: nn.Module, **config: object) -> RewrittenModule:
    settings = {"block_size": 4, "schedule": "two_phase"} | config
    return ar.rewrite(model, (ids(),), config=ar.AttnResConfig(**settings))


def fates(new: RewrittenModule) -> list[tuple[tuple[str, ...], str]]:
    return [(read.fused_with, read.left_out) for read in new.report.reads]


def test_the_add_and_the_norm_run_in_the_pass_of_the_merge():
    new = rewrite(gpt_of(lambda s, x: x + s.f(s.n1(x)), depth=4))
    assert fates(new) == [
        (("layer norm",), "the partial sum is the first update of its block"),
        (("add", "layer norm"), ""),
        (("add", "layer norm"), ""),
        ((), "its block is finished: phase 1 is the mix"),
    ]
    first, second, third = (node for node in new.graph.nodes if node.target is add_merge_norm)
    assert [str(arg) for arg in first.args[:2]] == ["type_as_default", "None"]
    assert [str(arg) for arg in second.args[:2]] == ["type_as_default", "linear_3"]
    assert third.args[0].args == (second, 0)
    assert third.kwargs == {"norm_eps": 1e-5, "eps": 1e-6, "factor": 2.0, "norm": "layer"}
    left = {str(node.target) for node in new.graph.nodes if node.op == "call_function"}
    assert "aten.layer_norm.default" in left  # of the first layer and of the last read
    assert not any(node.target is merge for node in new.graph.nodes)


class HandWrittenRms(nn.Module):
    """As transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def with_norms(make: type[nn.Module]) -> Gpt:
    model = gpt_of(lambda s, x: x + s.f(s.n1(x)), depth=4)
    for layer in model.layers:
        layer.n1 = make()
    return model


def test_a_norm_written_by_hand_is_fused():
    new = rewrite(with_norms(HandWrittenRms))
    assert [read.fused_with for read in new.report.reads] == [
        ("rms norm",),
        ("add", "rms norm"),
        ("add", "rms norm"),
        (),
    ]


def test_the_default_eps_of_rms_norm_is_proven_too():
    new = rewrite(with_norms(lambda: nn.RMSNorm(WIDTH)), output="mean")
    assert new.report.reads[1].fused_with == ("add", "rms norm")


def two_norms(s: Layer, x: Tensor) -> Tensor:
    return x + s.f(s.n1(x)) + s.g(s.n2(x))


def read_twice(s: Layer, x: Tensor) -> Tensor:
    return x + s.f(s.n1(x)) * torch.sigmoid(x)


@pytest.mark.parametrize(
    ("step", "reason"),
    [(two_norms, "2 consumers read it, and not as one norm"), (read_twice, "2 consumers read it, and not as one norm")],
)
def test_a_mix_with_other_readers_is_left_alone(step, reason):
    new = rewrite(gpt_of(step, depth=3), block_size=6)
    assert all(not read.fused_with for read in new.report.reads)
    assert {read.left_out for read in new.report.reads[:-1]} == {reason}


def test_direct_reads_are_left_alone():
    new = rewrite(gpt(), schedule="direct")
    assert set(fates(new)) == {((), "it is a direct read")}


def test_fused_gradients_reach_every_parameter():
    new = rewrite(gpt(depth=4))
    new(ids()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())


def test_a_fused_rewrite_compiles_and_gives_the_same():
    new = rewrite(gpt(depth=2))
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids()), new(ids()))
