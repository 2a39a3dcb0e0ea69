"""Hugging Face folders: weights or none, on meta or not, and what is refused."""

import json
import sys

import pytest
import torch

from attnres_rewrite.cli import huggingface, load
from attnres_rewrite.errors import ModelSpecError

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, pad_token_id=7))


@pytest.fixture
def folder(tmp_path, llama):
    """A folder with config.json alone."""
    config = llama.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_without_weights_it_is_random_and_says_so(folder):
    found = load.load(str(folder), batch=3, seq=9)
    assert type(found.model).__name__ == "LlamaForCausalLM"
    assert found.notes == (f"{folder} holds no weights: every parameter of LlamaForCausalLM is random",)
    assert found.kwargs["input_ids"].shape == (3, 9)
    assert found.model.config.use_cache is False
    assert found.model(**found.kwargs).logits.shape == (3, 9, 50)


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_weights_are_loaded(tmp_path, llama, shard):
    llama.save_pretrained(tmp_path, max_shard_size=shard)
    found = load.load(str(tmp_path))
    assert found.notes == ()
    assert not found.model.training
    for name, value in llama.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value)
    assert (tmp_path / huggingface.INDEX).exists() == (shard == "10KB")


def test_missing_weights_are_said(tmp_path, llama):
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (note,) = load.load(str(tmp_path)).notes
    assert "9 parameters of LlamaForCausalLM are in no file and random" in note


@pytest.mark.parametrize("with_weights", [False, True])
def test_meta_builds_no_data(folder, llama, with_weights):
    if with_weights:
        llama.save_pretrained(folder)
    found = load.load(str(folder), meta=True)
    assert {p.device.type for p in found.model.parameters()} == {"meta"}
    assert found.kwargs["input_ids"].device.type == "meta"
    assert found.notes == ()


def test_a_truncated_file_is_named(tmp_path, llama):
    llama.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelSpecError, match=r"model\.safetensors is damaged"):
        load.load(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path, llama):
    llama.save_pretrained(tmp_path, max_shard_size="10KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(ModelSpecError, match=shard.name):
        load.load(str(tmp_path))


def test_a_damaged_index_is_named(folder):
    (folder / huggingface.INDEX).write_text("{")
    with pytest.raises(ModelSpecError, match=r"index\.json is damaged"):
        load.load(str(folder))


def test_pickled_weights_are_refused(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelSpecError, match=r"pickle files only: pytorch_model\.bin"):
        load.load(str(folder))


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "{}",
        '{"model_type": "no_such_model"}',
        '{"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MyConfig"}}',
        '{"model_type": "llama", "hidden_size": "wide"}',
        '{"model_type": "llama", "hidden_size": 15, "num_attention_heads": 0}',
    ],
)
def test_a_config_that_gives_no_model(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "configuration_mine.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(ModelSpecError, match=r"gives no model, at .*config\.json"):
        load.load(str(tmp_path))


def test_without_architectures_an_auto_class_is_found(folder):
    config = json.loads((folder / "config.json").read_text()) | {"architectures": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert type(load.load(str(folder)).model).__name__ == "LlamaForCausalLM"


def test_a_missing_transformers_is_said(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelSpecError, match=r"needs transformers\n.*attnres-rewrite\[hf\]"):
        load.load(str(folder))


def test_a_factory_that_returns_a_transformers_model(tmp_path):
    (tmp_path / "net.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"def build(): return LlamaForCausalLM(LlamaConfig(**{TINY}))\n"
    )
    assert load.load(str(tmp_path / "net.py"), seq=5).kwargs["input_ids"].shape == (2, 5)
