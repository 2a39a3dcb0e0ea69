import json

import pytest
import torch

import attnres_rewrite as ar
from attnres_rewrite.errors import PartitionError
from tests.networks import VOCAB, WIDTH, Gpt, exported_gpt
from tests.networks import ids as small_ids

ids = torch.arange(16).reshape(2, 8) % VOCAB
UNIT = 2 * 8 * WIDTH * 4  # bytes of one carried tensor


def rewritten(depth=4, num_blocks=4, **options):
    new = ar.rewrite(Gpt(depth=depth), (ids,), config=ar.AttnResConfig(num_blocks=num_blocks), verify=False, **options)
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            parameter.add_(torch.randn_like(parameter))
    return new


@pytest.fixture(scope="module")
def new():
    return rewritten()


def run_stages(plan, *inputs):
    """Run the stages in one process, handing each value over by its name."""
    values, out = {}, None
    for stage in plan.stages:
        out = stage.module(*(inputs if stage.inputs else ()), *(values[name] for name in stage.reads))
        if stage is not plan.stages[-1]:
            values |= dict(zip(stage.makes, out, strict=True))
    return out


@pytest.mark.parametrize("cuts", ["balanced", "blocks", ["layers.1", "layers.2", "layers.3"]])
def test_the_stages_compute_the_model(new, cuts):
    plan = ar.partition(new, 2, 2, cuts=cuts)
    (found,) = run_stages(plan, ids)
    torch.testing.assert_close(found, new(ids))
    found.square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in new.named_parameters()}
    new.zero_grad()
    new(ids).square().mean().backward()
    for name, parameter in new.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    new.zero_grad()


# Once wrong: a saved rewrite keeps no sizes
def test_a_plan_is_printed_in_a_line_for_each_stage(new):
    head, balance, *lines = str(ar.partition(new, 2, cuts="blocks")).split("\n")
    assert head == "2 ranks with 1 stage each, placed as a loop; mode='exact'"
    assert balance.startswith("  slowest stage ")
    stages, traffic = lines[:2], lines[2:]
    assert [line.partition(":")[0] for line in stages] == ["  stage 0 on rank 0", "  stage 1 on rank 1"]
    assert [line.split()[-1] for line in traffic] == ["mode='naive'", "mode='paper'", "mode='exact'"]


def test_a_saved_rewrite_is_cut_alike(new, tmp_path):
    plan = ar.partition(new, 2, 2)
    found = ar.partition(ar.load(ar.save(new, tmp_path / "saved")), 2, 2)
    assert found.cuts == plan.cuts
    assert found.traffic == plan.traffic
    torch.testing.assert_close(run_stages(found, ids)[0], new(ids))


def test_another_size_than_the_example_runs_where_shapes_are_dynamic(new):
    plan = ar.partition(new, 2)
    other = torch.zeros((3, 5), dtype=torch.long)
    torch.testing.assert_close(run_stages(plan, other)[0], new(other))


@pytest.mark.parametrize(
    "variant",
    [{"num_heads": 4}, {"key_rank": 3, "recency_bias": 1.0}, {"gate": True}, {"gate": True, "recency_bias": 2.0}],
)
@pytest.mark.parametrize("cuts", ["blocks", ["layers.2"]])
def test_the_stages_compute_every_variant(variant, cuts):
    def of(config):
        new = ar.rewrite(exported_gpt(4), (small_ids(),), config=config, verify=False)
        with torch.no_grad():
            for parameter in ar.attnres_parameters(new):
                parameter.add_(torch.randn_like(parameter))
        return new, ar.partition(new, 2, cuts=cuts)

    def gradients(outputs):
        new.zero_grad()
        outputs.square().mean().backward()
        return {name: parameter.grad for name, parameter in new.named_parameters()}

    new, plan = of(ar.AttnResConfig(num_blocks=4, **variant))
    found, wanted = run_stages(plan, small_ids())[0], new(small_ids())
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients(found), gradients(wanted))
    # a running sum crosses beside the blocks
    _, plain = of(ar.AttnResConfig(num_blocks=4))
    units = plan.traffic["exact"].total_units
    assert units == plain.traffic["exact"].total_units + ("gate" in variant)


def test_aligned_blocks_move_what_the_formulas_say(new):
    plan = ar.partition(new, 2, 2, cuts="blocks")
    # 4 blocks in 4 stages, and the embedding, which is made in stage 0 as well
    assert {mode: of.per_hop_units for mode, of in plan.traffic.items()} == {
        "naive": (2, 3, 4),
        "paper": (2, 3, 2),
        "exact": (2, 1, 1),
    }
    assert plan.formulas() == {"naive": 6, "paper": 5, "exact": 3}
    assert plan.traffic["exact"].total_bytes == 4 * UNIT
    assert plan.traffic["exact"].held_bytes == (2 * UNIT, 3 * UNIT)


def test_a_v_turns_back():
    plan = ar.partition(rewritten(), 2, 2, cuts="blocks", placement="v")
    assert [fact.rank for fact in plan.facts] == [0, 1, 1, 0]
    assert plan.traffic["exact"].per_hop_units[1] == 0


def test_a_cut_inside_a_block_moves_its_partial_sum():
    whole = ar.partition(rewritten(num_blocks=2), 2, cuts=["layers.2"])
    inside = ar.partition(rewritten(num_blocks=2), 2, cuts=["layers.1"])
    assert whole.traffic["exact"].total_units == inside.traffic["exact"].total_units == 2
    assert ar.partition(rewritten(num_blocks=2), 2, cuts=["layers.3"]).traffic["exact"].total_units == 3


def test_facts_of_the_stages(new):
    plan = ar.partition(new, 2, cuts=["layers.2"])
    first, last = plan.facts
    assert first.modules == ("embed", "layers.0", "layers.1")
    assert last.modules == ("layers.2", "layers.3", "head")
    assert first.inputs == ("ids",)
    assert last.inputs == ()
    # attention 4 D^2 and MLP 4 D^2 weights a layer, and causal attention counted in full
    products = 2 * 16 * 8 * WIDTH * WIDTH + 4 * 2 * 8 * 8 * WIDTH
    assert first.flops == 2 * products
    assert last.flops == 2 * products + 2 * 16 * VOCAB * WIDTH
    assert plan.balance >= 1
    assert plan.tied in ({"head.weight": (0, 1)}, {"embed.weight": (0, 1)})
    shared = sum(parameter.numel() for parameter in new.parameters()) + VOCAB * WIDTH
    assert first.num_parameters + last.num_parameters == shared


def test_the_model_is_left_as_it_was(new):
    before, code = new(ids), new.code
    ar.partition(new, 2, 2)
    assert new.code == code
    torch.testing.assert_close(new(ids), before, rtol=0, atol=0)


def test_each_stage_is_scheduled_by_itself(new):
    plan = ar.partition(new, 2, cuts=["layers.2"])
    targets = [getattr(node.target, "__name__", "") for node in plan.stages[1].module.graph.nodes]
    assert "inter_block" in targets
    assert "add_merge_norm" in targets


def test_a_plan_as_json(new):
    facts = json.loads(json.dumps(ar.partition(new, 2, 2, cuts="blocks").to_dict()))
    assert facts["traffic"]["exact"]["total_units"] == 4
    assert facts["traffic"]["paper"]["per_hop_units"] == [2, 3, 2]
    assert [stage["rank"] for stage in facts["stages"]] == [0, 1, 0, 1]


def test_two_streams_are_cut_as_one_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config).eval()
    kwargs = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    new = ar.rewrite(model, kwargs=kwargs, config=ar.AttnResConfig(block_size=2), verify=False, dynamic_shapes={})
    plan = ar.partition(new, 2, 2)
    values, out = {}, None
    for stage in plan.stages:
        out = stage.module(*(ids for _ in stage.inputs), *(values[name] for name in stage.reads))
        values |= dict(zip(stage.makes, out, strict=False))
    torch.testing.assert_close(out[0], new(**kwargs)[0])
    # the encoder's result is read by the decoder's stages
    assert plan.traffic["exact"].total_units <= plan.traffic["paper"].total_units


class Convolutions(torch.nn.Module):
    """Its channels are the second dimension; each layer is x + conv(norm(x))."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.GroupNorm(1, WIDTH), torch.nn.Conv1d(WIDTH, WIDTH, 3, padding=1))
            for _ in range(4)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x.mean(-1)


# Once refused: a read of channels in another place than the last ends with a view
def test_channels_first_are_cut_by_name():
    x = torch.randn(2, WIDTH, 8)
    new = ar.rewrite(Convolutions(), (x,), config=ar.AttnResConfig(block_size=1), verify=False, dynamic_shapes={})
    plan = ar.partition(new, 2, cuts=["layers.2"])
    assert plan.facts[1].modules == ("layers.2", "layers.3")
    torch.testing.assert_close(run_stages(plan, x)[0], new(x))


class TestBadInput:
    def test_more_stages_than_cuts(self, new):
        with pytest.raises(PartitionError, match="9 cuts, and the model has 8 reads"):
            ar.partition(new, 10)

    def test_more_stages_than_blocks(self, new):
        with pytest.raises(PartitionError, match="5 stages need 4 cuts, and there are 3 ends of blocks|ends of blocks"):
            ar.partition(new, 6, cuts="blocks")

    @pytest.mark.parametrize(
        ("cuts", "says"),
        [
            (["layers.9"], "no module is called layers.9"),
            (["layers.1.mlp.down"], "does not begin with a read"),
            (["layers.0"], "layers.0 begins before the first read"),
            ([""], "no module is called ''"),
        ],
    )
    def test_names_that_begin_no_stage(self, new, cuts, says):
        with pytest.raises(PartitionError, match=says):
            ar.partition(new, 2, cuts=cuts)

    def test_names_out_of_order(self, new):
        with pytest.raises(PartitionError, match="order"):
            ar.partition(new, 3, cuts=["layers.2", "layers.1"])

    def test_names_of_one_place(self, new):
        with pytest.raises(PartitionError, match="layers.2 and layers.2.norm_1 are at the same place"):
            ar.partition(new, 3, cuts=["layers.2", "layers.2.norm_1"])

    def test_too_few_names(self, new):
        with pytest.raises(ValueError, match="into 2 stages, not 4"):
            ar.partition(new, 2, 2, cuts=["layers.2"])

    @pytest.mark.parametrize(
        ("options", "says"),
        [({"cuts": "even"}, "'balanced', 'blocks'"), ({"mode": "best"}, "'naive'"), ({"placement": "ring"}, "'loop'")],
    )
    def test_words(self, new, options, says):
        with pytest.raises(ValueError, match=says):
            ar.partition(new, 2, 1, **options)
