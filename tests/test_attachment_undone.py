"""attach() that fails, detach(), and a config object that several transformers models share: nothing stays behind."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import attnres_rewrite as ar
from tests.networks import VOCAB, Block, Gpt

CONFIG = ar.AttnResConfig(num_blocks=2)
ids = torch.arange(16).reshape(2, 8) % VOCAB


class Flagged(Block):
    """Has an attribute of the name that attach() wants."""

    def __init__(self):
        super().__init__()
        self.attn_res = False


def test_a_name_that_is_taken():
    model = Gpt(depth=1)
    model.layers.append(Flagged())
    before = model.state_dict().keys()
    for _ in range(2):
        with pytest.raises(ar.AlreadyRewrittenError, match=r"named layers\.1\.attn_res already"):
            ar.attach(model, CONFIG, (ids,))
    assert type(model) is Gpt
    assert model.state_dict().keys() == before
    model(ids)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def test_detach_of_a_model_that_lost_a_layer_since():
    model = Gpt(depth=2)
    ar.attach(model, ar.AttnResConfig(num_blocks=2), (torch.zeros(1, 4, dtype=torch.long),))
    model.layers = model.layers[:1]
    ar.detach(model)
    assert type(model) is Gpt
    assert not any("attn_res" in name for name in model.state_dict())


def test_detach_of_a_model_whose_class_was_changed_after_attach():
    model = Gpt(depth=1)
    model.scale = nn.Parameter(torch.ones(3))
    ar.attach(model, CONFIG, (ids,))
    parametrize.register_parametrization(model, "scale", Doubled())
    with pytest.raises(TypeError, match="remove_parametrizations"):
        ar.detach(model)
    assert ar.attnres_parameters(model)
    parametrize.remove_parametrizations(model, "scale")
    ar.detach(model)
    assert type(model) is Gpt
    model(ids)


class TestHuggingFace:
    @pytest.fixture
    def transformers(self):
        return pytest.importorskip("transformers")

    @pytest.fixture
    def config(self, transformers):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        return transformers.LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)

    @pytest.fixture
    def saved(self, transformers, config, tmp_path):
        """A folder of an attached model whose queries are all one."""
        model = transformers.LlamaForCausalLM(config)
        ar.attach(model, CONFIG)
        with torch.no_grad():
            for parameter in ar.attnres_parameters(model):
                parameter.fill_(1.0)
        model.save_pretrained(tmp_path)
        return tmp_path

    def test_two_models_of_one_config(self, transformers, config, tmp_path):
        teacher, student, plain = (transformers.LlamaForCausalLM(config) for _ in range(3))
        ar.attach(teacher, CONFIG)
        ar.attach(student, ar.AttnResConfig(num_blocks=3))
        ar.detach(teacher)
        student.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["attn_res"]["num_blocks"] == 3
        assert not hasattr(teacher.config, "attn_res")
        assert not hasattr(plain.config, "attn_res")
        assert plain.config is config

    def test_the_parts_of_a_model_still_share_its_config(self, transformers, config):
        model = transformers.LlamaForCausalLM(config)
        ar.attach(model, CONFIG)
        assert model.model.config is model.config
        assert model.model.layers[0].self_attn.config is model.config

    def test_after_a_failed_attach_the_next_one_loads_the_queries(self, transformers, saved):
        model = transformers.LlamaForCausalLM.from_pretrained(saved)
        carried = dict(model.config.attn_res)
        model.config.attn_res = carried | {"key_norm": False}
        for _ in range(2):
            with pytest.raises(ar.ArtifactError, match=r"the checkpoint has"):
                ar.attach(model)
        assert model.config.attn_res == carried | {"key_norm": False}
        model.config.attn_res = carried
        ar.attach(model)
        assert all(parameter.eq(1.0).all() for parameter in ar.attnres_parameters(model))

    def test_a_config_of_ones_own_at_reload(self, transformers, config, saved):
        model = transformers.LlamaForCausalLM.from_pretrained(saved, config=config)
        with pytest.raises(ar.ArtifactError, match="config of the training run"):
            ar.attach(model)
        ar.attach(model, CONFIG)
        assert all(parameter.eq(1.0).all() for parameter in ar.attnres_parameters(model))

    def test_a_config_of_a_later_release(self, transformers, saved):
        model = transformers.LlamaForCausalLM.from_pretrained(saved)
        model.config.attn_res = model.config.attn_res | {"heads": 4}
        with pytest.raises(ar.ArtifactError, match=r"another release\n.*'heads'"):
            ar.attach(model)

    def test_a_broken_file_in_the_folder(self, transformers, saved):
        model = transformers.LlamaForCausalLM.from_pretrained(saved)
        names = model.state_dict().keys()
        (saved / "model-extra.safetensors").write_bytes(b"garbage")
        with pytest.raises(ar.ArtifactError, match=r"model-extra\.safetensors is no safetensors file"):
            ar.attach(model)
        assert model.state_dict().keys() == names
        (saved / "model-extra.safetensors").unlink()
        ar.attach(model)


def test_a_pickled_state_dict_is_no_safetensors_file(tmp_path):
    model = Gpt(depth=1)
    ar.attach(model, CONFIG, (ids,))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with pytest.raises(ar.ArtifactError, match="torch.load"):
        ar.load_attnres_parameters(model, tmp_path / "state.pt")
