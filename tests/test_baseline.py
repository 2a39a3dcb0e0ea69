"""Mirrors attnres_rewrite/baseline.py: the values of a twin, and what is no twin."""

import pytest
import torch
from torch import nn

import attnres_rewrite as ar
from attnres_rewrite.baseline import own_values, twin_values
from tests.networks import gpt, ids


@pytest.fixture(scope="module")
def new() -> ar.RewrittenModule:
    return ar.rewrite(gpt(1), (ids(),), config=ar.AttnResConfig(num_blocks=1), verify=False)


def test_own_values_share_memory_and_need_no_gradient(new):
    program = new.programs[False]
    values = own_values(new, program.graph, program.original)
    weight = values["layers.0.norm_1.weight"]
    assert weight.data_ptr() == new.get_parameter("layers.0.norm_1.weight").data_ptr()
    assert not any(value.requires_grad for value in values.values())
    assert "layers.0.attn_res.0.query" in values


def test_a_twin_gives_its_values(new):
    twin = gpt(1)
    nn.init.ones_(twin.layers[0].attn.out.weight)
    values = twin_values(new, new.programs[False], twin)
    assert values["layers.0.attn.out.weight"].eq(1).all()
    assert not any("attn_res" in name for name in values)


def test_a_twin_has_no_gates():
    new = ar.rewrite(gpt(1), (ids(),), config=ar.AttnResConfig(num_blocks=1, gate=True), verify=False)
    assert "norm.weight" in twin_values(new, new.programs[False], gpt(1))


def test_a_tied_name_may_be_given_once(new):
    for left_out in ("head.weight", "embed.weight"):
        state = {name: value for name, value in gpt(1).state_dict().items() if name != left_out}
        values = twin_values(new, new.programs[False], state)
        torch.testing.assert_close(values["head.weight"], gpt(1).state_dict()["head.weight"])


def test_values_take_the_dtype_of_the_network(new):
    state = {name: value.to(torch.bfloat16) for name, value in gpt(1).state_dict().items()}
    assert twin_values(new, new.programs[False], state)["norm.weight"].dtype == torch.float32


def test_another_model_is_refused_with_names(new):
    state = gpt(1).state_dict()
    other = {name: value for name, value in state.items() if name != "norm.bias"} | {"extra.weight": torch.ones(1)}
    with pytest.raises(ar.CheckpointError, match=r"missing: norm\.bias; unknown: extra\.weight"):
        ar.diagnose(new, [ids()], baseline=other)
    with pytest.raises(ar.CheckpointError, match=r"of another shape: norm\.bias \[3\], not \[16\]"):
        ar.diagnose(new, [ids()], baseline=state | {"norm.bias": torch.ones(3)})
    with pytest.raises(ar.CheckpointError, match=r"unknown: layers\.1.* and 4 more"):
        ar.diagnose(new, [ids()], baseline=gpt(2))
    with pytest.raises(ar.CheckpointError, match="It is a rewrite itself"):
        ar.diagnose(new, [ids()], baseline=new)
    with pytest.raises(TypeError, match="baseline is a state dict, a module, None or False; got str"):
        ar.diagnose(new, [ids()], baseline="twin.pt")
    with pytest.raises(TypeError, match="got dict whose 'model' is a OrderedDict, not a tensor"):
        ar.diagnose(new, [ids()], baseline={"model": state, "step": 3})
