"""Mirrors attnres_rewrite/verify.py: the proofs hold for a right rewrite, and fail for every wrong one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import attnres_rewrite as ar
from attnres_rewrite.api import require_proofs
from attnres_rewrite.errors import ProofError
from attnres_rewrite.kernels.read.op import block_attn_res
from attnres_rewrite.kernels.variant_read.op import variant_attn_res
from attnres_rewrite.module import RewrittenModule
from attnres_rewrite.verify import relative_error
from tests.networks import Gpt, exported_gpt, gpt, ids


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


VARIANTS = [
    {"num_heads": 4},
    {"num_heads": 2, "output": "mean", "key_norm": False},
    {"key_rank": 5},
    {"key_rank": 5, "gate": True, "recency_bias": 1.5},
    {"gate": True, "num_heads": 16},
    {"gate": True, "schedule": "two_phase"},
    {"recency_bias": 2.0},
    {"recency_bias": 2.0, "output": "mean", "schedule": "two_phase"},
    {"recency_bias": -1.0, "num_heads": 2},
]


def of_exported(**config: object) -> RewrittenModule:
    config = {"schedule": "direct"} | config
    return ar.rewrite(exported_gpt(), (ids(),), config=ar.AttnResConfig(block_size=2, **config), verify=False)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_both_proofs_hold_for_every_variant(variant):
    new = of_exported(**variant)
    report = ar.verify(new)
    assert report.passed
    biased = "recency_bias" in variant and "gate" not in variant
    assert [proof.name for proof in report.proofs] == ["original, bias 0" if biased else "original", "independent"]
    original, independent = report.proofs
    # of the reads, three parameters each with a gate
    added = len(new.report.reads) * len(new.config.parameter_sizes(16))
    assert independent.num_gradients == original.num_gradients + added
    for proof in report.proofs:
        assert proof.output_error < 1e-13
        assert proof.gradient_error is not None
        assert proof.gradient_error < 1e-12


def test_at_zero_gates_the_original_is_met_whatever_the_queries_are():
    (original, _) = ar.verify(of_exported(gate=True)).proofs
    assert (original.output_error, original.gradient_error) == (0.0, 0.0)


def test_a_bias_is_told_of_with_what_it_does_to_the_outputs():
    model = gpt().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # a proof gives constant ones other values
    config = ar.AttnResConfig(block_size=2, recency_bias=2.0)
    new = ar.rewrite(model, (ids(),), config=config, verify=False, dynamic_shapes={})
    assert "does NOT start as the original: recency_bias=2.0" in new.report.notes[0]
    assert new.report.to_dict()["notes"] == list(new.report.notes)
    (note,) = ar.verify(new).notes
    found, wanted = new(ids()), model(ids())
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert f"puts its outputs off by {error:.1e}" in note


def test_what_starts_as_the_original_has_no_note():
    for config in ({}, {"gate": True, "recency_bias": 2.0}, {"num_heads": 2}):
        new = of_exported(**config)
        assert not new.report.notes
        assert "notes" not in new.report.to_dict()
        assert not ar.verify(new).notes


def change(**kwargs: object) -> Callable[[fx.Graph], None]:
    def spoil(graph: fx.Graph) -> None:
        node = next(node for node in graph.nodes if node.target is variant_attn_res)
        node.kwargs = {**node.kwargs, **kwargs}

    return spoil


def open_the_gate(graph: fx.Graph) -> None:
    node = next(node for node in graph.nodes if str(node.target).endswith(".gate"))
    (product,) = node.users
    product.replace_all_uses_with(product.args[0])


def leave_the_read_out(graph: fx.Graph) -> None:
    node = next(node for node in graph.nodes if str(node.target).endswith(".gate"))
    (product,) = node.users
    (total,) = product.users
    total.replace_all_uses_with(total.args[0])


@pytest.mark.parametrize(
    ("variant", "spoil"),
    [
        ({"num_heads": 2}, change(num_heads=4)),
        ({"num_heads": 2}, change(recency_bias=0.1)),
        ({"recency_bias": 1.0}, change(recency_bias=0.0)),
        ({"recency_bias": 1.0}, change(recency_bias=-1.0)),
        ({"gate": True}, open_the_gate),
        ({"gate": True}, leave_the_read_out),
    ],
)
def test_every_wrong_variant_fails_a_proof(variant, spoil):
    new = of_exported(**variant)
    spoil(new.programs[False].graph)
    assert not ar.verify(new).passed


def test_nothing_is_proven_by_outputs_that_are_no_numbers() -> None:
    model = gpt()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(ProofError, match="the outputs of the original hold no finite number"):
        ar.rewrite(model, (ids(),), dynamic_shapes={})


def test_a_buffer_that_the_forward_assigns_is_put_back() -> None:
    class Counting(Gpt):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, ids: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(ids) * self.calls

    model = Counting().eval()
    before = model.calls
    new = ar.rewrite(model, (ids(),), dynamic_shapes={})
    assert model.calls is before is new.calls
    assert before == 0
