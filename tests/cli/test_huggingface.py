"""Hugging Face folders: weights or none, on meta or not, and what is refused."""

import json
import sys

import pytest
import torch

from attnres_rewrite.cli import huggingface, load
from attnres_rewrite.errors import ModelSpecError
from attnres_rewrite.example_inputs import example_inputs

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


def test_ids_are_words_and_reproducible(llama):
    ids = example_inputs(llama, 4, 200)["input_ids"]
    special = {llama.config.bos_token_id, llama.config.eos_token_id, 7, 0}
    assert not special & set(ids.flatten().tolist())
    torch.testing.assert_close(example_inputs(llama, 4, 200)["input_ids"], ids)


def test_making_inputs_leaves_the_generator_alone(llama):
    before = torch.get_rng_state()
    example_inputs(llama, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)


def small_t5():
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def small_vit():
    sizes = {key: TINY[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=1, image_size=32, patch_size=16)
    return transformers.ViTForImageClassification(config)


def small_whisper():
    config = transformers.WhisperConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_mel_bins=8,
        max_source_positions=10,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (small_t5, {"input_ids", "decoder_input_ids"}),
        (small_vit, {"pixel_values"}),
        (small_whisper, {"input_features", "decoder_input_ids"}),
    ],
)
def test_inputs_fit_other_kinds_of_models(make, names):
    model = make().eval()
    inputs = example_inputs(model, 2, 4)
    assert inputs.keys() == names
    assert model(**inputs).logits.shape[0] == 2


def test_an_input_nobody_can_make_up(llama):
    llama.main_input_name = "point_cloud"
    with pytest.raises(ModelSpecError, match="LlamaForCausalLM wants point_cloud"):
        example_inputs(llama, 1, 2)


def test_a_factory_that_returns_a_transformers_model(tmp_path):
    (tmp_path / "net.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"def build(): return LlamaForCausalLM(LlamaConfig(**{TINY}))\n"
    )
    assert load.load(str(tmp_path / "net.py"), seq=5).kwargs["input_ids"].shape == (2, 5)
