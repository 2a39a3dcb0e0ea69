"""Mirrors attnres_rewrite/model_caches.py: a Hugging Face model called the plain way."""

import pytest
import torch

import attnres_rewrite as ar

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_a_model_that_returns_its_cache_is_rewritten_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    ids = torch.randint(3, 61, (1, 7))
    new = ar.rewrite(model, (ids,))
    assert new.report.verify.passed
    expected = model(ids)
    for found in (new(ids), ar.load(ar.save(new, tmp_path / "llama"))(ids)):
        assert type(found) is type(expected)
        assert type(found.past_key_values) is type(expected.past_key_values)
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(found.past_key_values.layers[1].keys, expected.past_key_values.layers[1].keys)


@pytest.mark.slow
def test_a_cache_that_torch_cannot_see_into_is_refused_with_the_way_out():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 61, (2, 7))
    with pytest.raises(ar.CaptureError, match="use_cache=False"):
        ar.rewrite(model, kwargs={"input_ids": ids, "decoder_input_ids": ids})
