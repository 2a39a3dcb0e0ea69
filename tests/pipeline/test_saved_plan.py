import json

import pytest
import torch

import attnres_rewrite as ar
from attnres_rewrite.errors import PartitionError
from tests.networks import VOCAB, Gpt

ids = torch.arange(16).reshape(2, 8) % VOCAB


def rewritten(depth=4, num_blocks=4, inputs=ids, device="cpu"):
    with torch.device(device):
        model = Gpt(depth=depth)
    config = ar.AttnResConfig(num_blocks=num_blocks)
    return ar.rewrite(model, (inputs.to(device),), config=config, verify=False, dynamic_shapes={})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a file with a plan that was made without weights."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan = ar.partition(rewritten(device="meta"), 2, 2, mode="paper")
    path.write_text(json.dumps(plan.to_dict()))
    return path


def test_a_plan_of_meta_tensors_is_laid_upon_the_model(saved):
    found = ar.load_plan(saved, rewritten())
    facts = json.loads(saved.read_text())
    assert json.loads(json.dumps(found.to_dict())) == facts
    assert list(found.cuts) == facts["cuts"]
    assert found.mode == "paper"
    (out,) = found.stages[-1].module.graph.output_node().args[0]
    assert out.meta["val"].device.type == "cpu"


@pytest.mark.parametrize("other", [{"depth": 3}, {"depth": 5}, {"num_blocks": 2}, {"inputs": ids[:, :4]}])
def test_a_plan_for_another_model_is_refused(saved, other):
    new = rewritten(**other)
    with pytest.raises(PartitionError, match="the plan is for another model, or for inputs of other sizes"):
        ar.load_plan(saved, new)


# Once told that the plan is for another model
@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"cuts": ["layers.9", "layers.2", "layers.3"]}, "was edited, .*\\n.*no module is called layers.9"),
        ({"num_ranks": 3}, "was edited, .*\\n.*3 names of modules cut"),
        ({"mode": "best"}, "was edited, .*\\n.*mode='best'"),
        ({"num_ranks": "2"}, "the plan has num_ranks '2'"),
        ({"cuts": None}, "the plan has cuts None"),
    ],
)
def test_a_plan_that_was_edited(saved, edit, says):
    with pytest.raises(PartitionError, match=says):
        ar.load_plan(json.loads(saved.read_text()) | edit, rewritten())


@pytest.mark.parametrize(
    ("text", "says"), [("{}", "lacks model_hash, num_ranks"), ("no JSON", "is no plan"), ("3", "is no plan")]
)
def test_a_file_that_is_no_plan(tmp_path, text, says):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PartitionError, match=says):
        ar.load_plan(path, rewritten())


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PartitionError, match="is no plan"):
        ar.load_plan(tmp_path / "none.json", rewritten())


def test_names_of_reads_are_cuts():
    new = rewritten()
    plan = ar.partition(new, 2, cuts=["layers.1.attn_res.1"])
    assert plan.cuts == ("layers.1.attn_res.1",)
