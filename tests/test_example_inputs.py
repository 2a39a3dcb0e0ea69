"""Inputs made up for transformers models, from their configs."""

import pytest
import torch

from attnres_rewrite.errors import ModelSpecError
from attnres_rewrite.example_inputs import example_inputs, is_huggingface

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
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, pad_token_id=7))


def test_what_is_a_transformers_model(llama):
    assert is_huggingface(llama)
    assert not is_huggingface(torch.nn.Linear(2, 2))
    assert not is_huggingface(None)


def test_ids_are_words_and_reproducible(llama):
    ids = example_inputs(llama, 4, 200)["input_ids"]
    special = {llama.config.bos_token_id, llama.config.eos_token_id, 7, 0}
    assert not special & set(ids.flatten().tolist())
    torch.testing.assert_close(example_inputs(llama, 4, 200)["input_ids"], ids)


def test_making_inputs_leaves_every_generator_alone(llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs were seeded"))
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
