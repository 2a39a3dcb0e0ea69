"""Mirrors attnres_rewrite/verify.py: the proofs hold for a right rewrite, and fail for every wrong one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import attnres_rewrite as ar
from attnres_rewrite.api import require_proofs
from attnres_rewrite.kernels.read.op import block_attn_res
from attnres_rewrite.module import RewrittenModule
from attnres_rewrite.verify import relative_error
from tests.networks import Gpt, gpt, ids


def rewritten(**config: object) -> RewrittenModule:
    config = {"schedule": "direct"} | config
    return ar.rewrite(gpt(), (ids(),), config=ar.AttnResConfig(block_size=2, **config), verify=False)


@pytest.mark.parametrize("output", ["sum", "mean"])
def test_both_proofs_hold_in_float64(output):
    report = ar.verify(rewritten(output=output))
    assert report.passed
    assert [proof.name for proof in report.proofs] == ["original", "independent"]
    for proof in report.proofs:
        assert proof.dtype == "float64"
        assert proof.num_outputs == 1
        assert proof.output_error < 1e-13
        assert proof.gradient_error is not None
        assert proof.gradient_error < 1e-12


def test_both_modes_are_proved_when_they_differ():
    new = ar.rewrite(gpt(dropout=0.2), (ids(),))
    assert [(proof.name, proof.mode) for proof in new.report.verify.proofs] == [
        ("capture", "eval"),
        ("original", "eval"),
        ("independent", "eval"),
        ("original", "train"),
        ("independent", "train"),
    ]


def test_a_trained_rewrite_is_still_provable_and_is_not_changed():
    new = rewritten()
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if name.endswith("query"):
                parameter.normal_()
    before = {name: value.clone() for name, value in new.state_dict().items()}
    assert ar.verify(new).passed
    assert all(torch.equal(before[name], value) for name, value in new.state_dict().items())


def reads_of(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is block_attn_res]


def drop_a_source(graph: fx.Graph) -> None:
    node = reads_of(graph)[-1]
    node.args = (node.args[0][:-1], node.args[1])


def count_the_embedding_twice(graph: fx.Graph) -> None:
    node = reads_of(graph)[-1]
    node.args = ([node.args[0][0], *node.args[0]], node.args[1])


def swap_two_queries(graph: fx.Graph) -> None:
    first, second = reads_of(graph)[:2]
    first.args[1].target, second.args[1].target = second.args[1].target, first.args[1].target


def never_reset_the_partial_sum(graph: fx.Graph) -> None:
    """The last block's partial sum starts from the block before it."""
    node = reads_of(graph)[-1]
    sources = list(node.args[0])
    with graph.inserting_before(node):
        sources[-1] = graph.call_function(torch.ops.aten.add.Tensor, (sources[-1], sources[-2]))
        node.args = (sources, node.args[1])


def regroup(graph: fx.Graph) -> None:
    """Two finished blocks are handed over as one: the sum is right, the softmax is not."""
    node = reads_of(graph)[-1]
    first, second, third, *rest = node.args[0]
    with graph.inserting_before(node):
        joined = graph.call_function(torch.ops.aten.add.Tensor, (second, third))
        nothing = graph.call_function(torch.ops.aten.zeros_like.default, (third,))
        node.args = ([first, joined, nothing, *rest], node.args[1])


def read_past_the_norm(graph: fx.Graph) -> None:
    """The head reads a source where it should read the mix."""
    node = reads_of(graph)[-1]
    node.replace_all_uses_with(node.args[0][-1])


def use_another_eps(graph: fx.Graph) -> None:
    node = reads_of(graph)[0]
    node.kwargs = {**node.kwargs, "eps": 1e-2}


def detach_a_source(graph: fx.Graph) -> None:
    """Outputs stay right; gradients do not."""
    node = reads_of(graph)[-1]
    with graph.inserting_before(node):
        cut = graph.call_function(torch.ops.aten.detach.default, (node.args[0][1],))
        node.args = ([node.args[0][0], cut, *node.args[0][2:]], node.args[1])


@pytest.mark.parametrize(
    "spoil",
    [
        drop_a_source,
        count_the_embedding_twice,
        swap_two_queries,
        never_reset_the_partial_sum,
        regroup,
        read_past_the_norm,
        use_another_eps,
        detach_a_source,
    ],
)
def test_every_wrong_graph_fails_a_proof(spoil: Callable[[fx.Graph], None]):
    new = rewritten()
    spoil(new.programs[False].graph)

    report = ar.verify(new)

    assert not report.passed
    with pytest.raises(ar.ProofError, match="proofs failed"):
        require_proofs(report)


def test_a_zero_initialised_branch_does_not_make_the_proofs_blind():
    model = gpt()
    for layer in model.layers:
        nn.init.zeros_(layer.mlp.down.weight)
        nn.init.zeros_(layer.mlp.down.bias)
    new = ar.rewrite(model, (ids(),), config=ar.AttnResConfig(block_size=2, schedule="direct"))
    spoiled = new.programs[False].graph
    swap_two_queries(spoiled)
    assert not ar.verify(new).passed


class Mutating(Gpt):
    """Batch norm in the head: the forward updates buffers."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.bn = nn.BatchNorm1d(5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bn(super().forward(ids))


def test_proofs_leave_buffers_of_the_model_alone():
    torch.manual_seed(0)
    model = Mutating().train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    new = ar.rewrite(model, (ids(4),))
    assert new.report.verify.passed
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


def test_proofs_leave_every_generator_alone(monkeypatch):
    model = gpt(depth=1, dropout=0.2).train()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs were seeded"))
    before = torch.get_rng_state()
    new = ar.rewrite(model, (ids(),))
    assert new.report.verify.passed
    assert torch.equal(torch.get_rng_state(), before)


def test_proofs_on_other_inputs_than_the_capture():
    assert ar.verify(rewritten(), (ids(3, 9),)).passed
    with pytest.raises(TypeError, match="takes ids"):
        ar.verify(rewritten(), (), {"tokens": ids()})


def test_a_model_too_large_for_float64_is_refused_before_it_is_tried(monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    with pytest.raises(ar.ProofError, match="verify=False"):
        ar.verify(rewritten())


def test_meta_tensors_are_refused():
    with torch.device("meta"):
        model = Gpt()
    meta = torch.zeros(2, 5, dtype=torch.long, device="meta")
    new = ar.rewrite(model, (meta,), verify=False)
    with pytest.raises(ar.CaptureError, match="meta device"):
        ar.verify(new)


def test_relative_error_measures_each_tensor_and_passes_no_nan():
    one = torch.ones(3, dtype=torch.float64)
    assert relative_error([one, 1e-1 * one], [one, 1.1e-1 * one]) == pytest.approx(0.1)
    assert relative_error([one], [one * float("nan")]) == float("inf")
    assert relative_error([one], [one, one]) == float("inf")
    assert relative_error([torch.tensor([1])], [torch.tensor([2])]) == float("inf")
    assert relative_error([3], [4]) == float("inf")
