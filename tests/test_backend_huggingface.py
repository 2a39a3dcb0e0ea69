"""What transformers does in a forward that Dynamo cannot trace: refused, and the refusal names the setting."""

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import attnres_rewrite as ar

transformers = pytest.importorskip("transformers")
ids = torch.arange(3, 19).reshape(2, 8)


@pytest.fixture
def llama():
    torch._dynamo.reset()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes))
    ar.attach(model, ar.AttnResConfig(num_blocks=2))
    model.compile(backend="attnres", options={"backend": "aot_eager"})
    return model.train()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_with_a_cache(llama):
    llama.gradient_checkpointing_enable()
    with pytest.raises(BackendCompilerFailed, match=r"model\.config\.use_cache = False"):
        llama(ids, labels=ids)
    llama.config.use_cache = False
    llama(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in ar.attnres_parameters(llama))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_of_frozen_embeddings(llama):
    llama.config.use_cache = False
    llama.model.embed_tokens.requires_grad_(False)
    llama(ids, labels=ids).loss.backward()
    wanted = [parameter.grad for parameter in ar.attnres_parameters(llama)]
    llama.gradient_checkpointing_enable()
    with pytest.raises(BackendCompilerFailed, match=r"model\.disable_input_require_grads\(\)"):
        llama(ids, labels=ids)
    llama.disable_input_require_grads()
    llama.zero_grad()
    llama(ids, labels=ids).loss.backward()
    for parameter, gradient in zip(ar.attnres_parameters(llama), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_hidden_states(llama):
    with pytest.raises(BackendCompilerFailed, match="output_hidden_states and output_attentions"):
        llama(ids, output_hidden_states=True)
    ar.detach(llama)
    inputs = {"input_ids": ids, "output_hidden_states": True, "use_cache": False}
    new = ar.rewrite(llama, (), inputs, config=ar.AttnResConfig(num_blocks=2), dynamic_shapes={}, verify=False)
    assert len(new(**inputs).hidden_states) == 3


@pytest.mark.slow
def test_the_mixed_precision_of_accelerate(llama):
    accelerate = pytest.importorskip("accelerate")
    with torch.no_grad():
        for parameter in ar.attnres_parameters(llama):
            parameter.add_(torch.randn_like(parameter))
    plain = llama(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        wanted = llama(ids).logits
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(llama)
    torch.testing.assert_close(prepared(ids).logits, wanted.float(), rtol=0, atol=0)
    new = ar.as_rewritten(prepared, kwargs={"input_ids": ids, "use_cache": False}, verify=False)
    torch.testing.assert_close(new(input_ids=ids).logits, plain)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    torch.testing.assert_close(unwrapped(ids).logits, plain, rtol=0, atol=0)
    ar.detach(prepared)
    assert not torch.allclose(unwrapped(ids).logits, plain)


@pytest.mark.slow
def test_generate_of_an_encoder_and_a_decoder():
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=32, **sizes, **special)).eval()
    config, quick = ar.AttnResConfig(num_blocks=2), {"backend": "attnres", "options": {"backend": "aot_eager"}}
    ar.attach(model, config)
    names = set(model.state_dict())
    model.compile(**quick)
    with pytest.raises(ar.NotCompiledError, match="as generate\\(\\) needs an encoder"):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    ar.detach(model)
    ar.attach(model.encoder, config)
    states = {"encoder_hidden_states": torch.randn(2, 8, 16), "use_cache": False}
    ar.attach(model.decoder, config, kwargs={"input_ids": ids, **states})
    assert set(model.state_dict()) == names
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    model.encoder.compile(**quick)
    model.decoder.compile(**quick)
    cached = model.generate(ids, max_new_tokens=3, do_sample=False)
    torch.testing.assert_close(model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False), cached)
