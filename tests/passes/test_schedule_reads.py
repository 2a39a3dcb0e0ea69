"""Mirrors attnres_rewrite/passes/schedule_reads.py."""

import operator

import pytest
import torch
from torch import Tensor, fx

import attnres_rewrite as ar
from attnres_rewrite.kernels.inter_block.op import inter_block
from attnres_rewrite.kernels.merge.op import add_merge_norm, merge, with_recency_bias
from attnres_rewrite.kernels.read.op import block_attn_res
from attnres_rewrite.kernels.variant_read.op import variant_attn_res
from attnres_rewrite.module import RewrittenModule
from attnres_rewrite.passes.schedule_reads import direct_rows, two_phase_rows
from tests.networks import WIDTH, Gpt, Layer, exported_gpt, gpt, gpt_of, ids


def rewrite(model: torch.nn.Module, **config: object) -> RewrittenModule:
    return ar.rewrite(model, (ids(),), config=ar.AttnResConfig(**config))


def read_by_a_linear(s: Layer, x: Tensor) -> Tensor:
    """A reader that is no norm, so that nothing fuses."""
    return x + s.f(x * s.gain)


def text_of(graph: fx.Graph) -> str:
    """Print phase 1 and the merges, and nothing else."""
    lines = []
    for node in graph.nodes:
        if node.target is inter_block:
            sources, queries = node.args
            lines.append(f"inter_block({sources}, {[query.target for query in queries]})")
        if node.target is merge:
            out, lse, partial, query = node.args
            place = out.args[1], lse.args[1], out.args[0].args[1], lse.args[0].args[1]
            lines.append(f"merge{place} {partial} {query.target} x{node.kwargs['factor']:g}")
        if node.target is block_attn_res:
            lines.append(f"read({node.args[0]})")
    return "\n".join(lines)


def test_the_reads_of_a_block_share_phase_1():
    new = rewrite(gpt_of(read_by_a_linear, depth=4), block_size=2, schedule="two_phase")
    assert text_of(new.graph) == (
        "inter_block([embedding], ['layers.1.f.attn_res.0.query'])\n"
        "merge(0, 0, 0, 1) type_as_default layers.1.f.attn_res.0.query x2\n"
        "inter_block([embedding, add_tensor], ['layers.2.f.attn_res.0.query', 'layers.3.f.attn_res.0.query'])\n"
        "merge(1, 1, 0, 1) type_as_default_1 layers.3.f.attn_res.0.query x3\n"
        "inter_block([embedding, add_tensor, add_tensor_1], ['attn_res.0.query'])"
    )


def test_a_finished_block_needs_no_merge_only_the_number_of_its_sources():
    new = rewrite(gpt_of(read_by_a_linear, depth=4), block_size=2, schedule="two_phase")
    phases = [node for node in new.graph.nodes if node.target is inter_block]
    # the first read of a block has nothing to merge
    assert [node.kwargs["factors"] for node in phases] == [[1.0], [2.0, 1.0], [3.0]]
    reads = [node for node in new.graph.nodes if "attn_res" in node.meta]
    assert {node.target for node in reads} == {operator.getitem, merge}


def test_direct_leaves_every_read_as_it_is():
    new = rewrite(gpt(), block_size=2, schedule="direct")
    assert not any(node.target in (inter_block, merge, add_merge_norm) for node in new.graph.nodes)
    assert {group.schedule for group in new.report.streams[0].groups} == {"direct"}


def test_auto_takes_what_moves_fewer_bytes():
    new = rewrite(gpt(depth=4), block_size=4)
    (stream,) = new.report.streams
    for group in stream.groups:
        fewer = "two_phase" if group.two_phase_bytes < group.direct_bytes else "direct"
        assert group.schedule == fewer
    assert {group.schedule for group in stream.groups} == {"direct", "two_phase"}
    of_read = {name: group.schedule for group in stream.groups for name in group.reads}
    assert [read.schedule for read in stream.reads] == [of_read[read.query_name[:-6]] for read in stream.reads]


def test_bytes_follow_the_written_count():
    new = rewrite(gpt_of(read_by_a_linear, depth=4), block_size=2)
    group = new.report.streams[0].groups[1]
    assert (len(group.reads), group.num_finished, group.num_merges) == (2, 2, 1)
    assert group.direct_bytes == 4 * WIDTH * direct_rows(2, 2, 1)
    assert group.two_phase_bytes == 4 * WIDTH * two_phase_rows(2, 2, 1, 0)


def test_sources_that_a_scale_changes_are_not_shared():
    """Each state is scaled before the next add, so each read mixes other sources: every group has one read."""
    new = rewrite(gpt_of(lambda s, x: 0.9 * x + s.f(s.n1(x)), depth=4), block_size=4, schedule="two_phase")
    assert [len(group.reads) for group in new.report.streams[0].groups] == [1] * 4


@pytest.mark.parametrize("schedule", ["auto", "two_phase"])
@pytest.mark.parametrize("output", ["sum", "mean"])
def test_every_schedule_computes_the_same(schedule, output):
    def run(chosen: str) -> Tensor:
        new = rewrite(gpt(depth=4), block_size=3, output=output, schedule=chosen).double()
        torch.manual_seed(1)
        for name, parameter in new.named_parameters():
            if "attn_res" in name:
                torch.nn.init.normal_(parameter)
        return new(ids())

    torch.testing.assert_close(run(schedule), run("direct"), rtol=1e-12, atol=1e-12)


def test_two_phases_without_gains():
    new = rewrite(gpt(depth=4), block_size=3, key_norm=False, schedule="two_phase")
    assert new.report.verify is not None
    assert new.report.verify.passed


class Skipping(Gpt):
    """Adds an older state again, as a U-Net does: the read of that state is a source of later reads."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == 0:
                older = x
            if number == 1:
                x = x + older
        return self.head(self.norm(x))


def test_a_source_may_be_a_read_of_another_group():
    torch.manual_seed(0)
    new = rewrite(Skipping(depth=4).eval(), num_blocks="full", schedule="two_phase")
    assert new.report.streams[0].update_kinds == {"residual": 8, "skip": 1}
    assert new.report.verify is not None
    assert new.report.verify.passed


def test_heads_and_sliced_keys_stay_direct_and_the_report_says_why():
    for field in ({"num_heads": 2}, {"key_rank": 3}):
        new = ar.rewrite(exported_gpt(4), config=ar.AttnResConfig(block_size=4, **field), verify=False)
        (stream,) = new.report.streams
        spelled = "=".join(map(str, *field.items()))
        assert {group.schedule for group in stream.groups} == {"direct"}
        assert {read.left_out for read in stream.reads} == {f"it is a direct read: {spelled} has no two-phase form"}
        assert stream.runs_as == f"plain PyTorch (no kernel for {spelled}, and no two-phase form)"


def test_with_a_bias_the_read_at_the_end_of_a_block_merges_the_sum_of_that_block():
    """The bias is on the newest source alone, and phase 1 shares the others."""
    new = rewrite(gpt_of(read_by_a_linear, depth=4), block_size=2, schedule="two_phase", recency_bias=2.0)
    assert [len(group.reads) for group in new.report.streams[0].groups] == [2, 2]
    assert [group.num_merges for group in new.report.streams[0].groups] == [2, 2]
    lses = [node.args[1] for node in new.graph.nodes if node.target is merge]
    lses += [node.args[3] for node in new.graph.nodes if node.target is add_merge_norm]
    assert [lse.target for lse in lses] == [with_recency_bias] * 4
    assert {lse.kwargs["recency_bias"] for lse in lses} == {2.0}
    assert not any(node.target in (block_attn_res, variant_attn_res) for node in new.graph.nodes)


def test_merges_with_a_bias_are_fused_as_others_are():
    config = ar.AttnResConfig(block_size=4, schedule="two_phase", recency_bias=-1.0)
    new = ar.rewrite(exported_gpt(4), config=config, verify=False)
    fused = [node for node in new.graph.nodes if node.target is add_merge_norm]
    assert len(fused) == len(new.report.reads)


@pytest.mark.parametrize("variant", [{"recency_bias": 1.5}, {"gate": True}, {"gate": True, "recency_bias": -2.0}])
def test_two_phases_of_a_variant_compute_what_its_direct_reads_do(variant):
    def run(chosen: str) -> Tensor:
        config = ar.AttnResConfig(block_size=3, schedule=chosen, **variant)
        new = ar.rewrite(exported_gpt(4), config=config, verify=False).double()
        torch.manual_seed(1)
        for name, parameter in new.named_parameters():
            if "attn_res" in name:
                torch.nn.init.normal_(parameter)
        return new(ids())

    torch.testing.assert_close(run("two_phase"), run("direct"), rtol=1e-12, atol=1e-12)
