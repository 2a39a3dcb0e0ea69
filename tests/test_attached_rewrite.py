"""as_rewritten(): the rewrite of an attached model, of the same parameters, while it stays attached."""

import copy

import pytest
import torch
from torch import nn

import attnres_rewrite as ar
from tests.attached import CONFIG, QUICK, assert_same, attached, ids, small
from tests.networks import WIDTH, Block, Gpt

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


def test_it_computes_what_the_compiled_model_does():
    model, other = attached()
    new = ar.as_rewritten(model, (ids,))
    assert new.report.verify.passed
    assert new.config == CONFIG
    assert new.training == model.training
    assert_same(model, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new(ids), other(ids), rtol=1e-12, atol=1e-12)


def test_it_has_the_very_parameters_and_follows_their_training():
    model, _ = attached()
    new = ar.as_rewritten(model, (ids,), verify=False)
    mine, its = dict(model.named_parameters()), dict(new.named_parameters())
    assert mine.keys() == its.keys()
    assert all(its[name] is parameter for name, parameter in mine.items())
    before = new(ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids).square().mean().backward()
    optimizer.step()
    after = new(ids)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model(ids), rtol=1e-12, atol=1e-12)


def test_the_model_stays_attached_and_compiled():
    model, _ = attached()
    wanted, names = model(ids), list(model.state_dict())
    model.zero_grad()
    ar.as_rewritten(model, (ids,))
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(model(ids), wanted)
    assert list(model.state_dict()) == names
    assert len(ar.attnres_parameters(model)) == 2 * 4
    assert all(parameter.grad is None for parameter in model.parameters())


def test_buffers_are_shared():
    class Counting(Gpt):
        def __init__(self):
            super().__init__(depth=2)
            self.register_buffer("scale", torch.ones(()))

        def forward(self, ids):
            return super().forward(ids) * self.scale

    model = Counting()
    ar.attach(model, CONFIG, (ids,))
    new = ar.as_rewritten(model, (ids,), verify=False)
    before = new(ids)
    model.scale.fill_(2.0)
    torch.testing.assert_close(new(ids), 2 * before)


@pytest.mark.parametrize("config", [ar.AttnResConfig(num_blocks=2, gate=True), ar.AttnResConfig(num_blocks="full")])
def test_other_configs(config):
    model, other = attached(config=config)
    new = ar.as_rewritten(model, (ids,), verify=False)
    torch.testing.assert_close(new(ids), other(ids), rtol=1e-12, atol=1e-12)


def test_queries_of_a_model_that_was_cast_stay_so():
    model = small().float()
    ar.attach(model, CONFIG, (ids,))
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    model.bfloat16()
    new = ar.as_rewritten(model, (ids,))
    assert {parameter.dtype for parameter in new.parameters()} == {torch.bfloat16}
    compiled = torch.compile(model, **QUICK)
    torch.testing.assert_close(new(ids), compiled(ids), rtol=0.05, atol=0.05)


def test_a_module_around_it_is_rewritten_whole():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.bias = inner, nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, ids):
            return self.inner(ids) + self.bias

    model, other = attached()
    new = ar.as_rewritten(Around(model), (ids,))
    assert new.get_parameter("inner.attn_res.0.query") is model.get_parameter("attn_res.0.query")
    torch.testing.assert_close(new(ids), other(ids) + 1)


def test_what_torch_compile_returned_is_its_model():
    model, other = attached()
    new = ar.as_rewritten(torch.compile(model, **QUICK), (ids,), verify=False)
    assert "attn_res.0.query" in new.state_dict()
    torch.testing.assert_close(new(ids), other(ids))


def test_what_data_parallel_is_around_is_its_model(tmp_path):
    model, other = attached()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        new = ar.as_rewritten(nn.parallel.DistributedDataParallel(model), (ids,), verify=False)
    finally:
        torch.distributed.destroy_process_group()
    assert "attn_res.0.query" in new.state_dict()
    torch.testing.assert_close(new(ids), other(ids))


def test_a_transformers_model_needs_no_inputs(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes))
    ar.attach(model, CONFIG)
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    new = ar.as_rewritten(model)
    compiled = torch.compile(model, **QUICK)
    found, wanted = new(input_ids=ids, use_cache=False).logits, compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    ar.save(new, tmp_path / "it")
    torch.testing.assert_close(ar.load(tmp_path / "it")(input_ids=ids, use_cache=False).logits, found)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("modules_to_save", [pytest.param(None, marks=pytest.mark.slow), ["attn_res"]])
def test_a_lora_model(modules_to_save):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes))
    ar.attach(model, CONFIG)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=modules_to_save))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name or "attn_res" in name:
                parameter.add_(torch.randn_like(parameter))
    batch = {"input_ids": ids, "use_cache": False}
    new = ar.as_rewritten(adapted, kwargs=batch, verify=False)
    wanted = torch.compile(adapted, **QUICK)(**batch).logits
    torch.testing.assert_close(new(**batch).logits, wanted, rtol=1e-4, atol=1e-5)


class TestRefusals:
    def test_a_model_that_is_not_attached(self):
        with pytest.raises(ar.NotAttachedError):
            ar.as_rewritten(small(), (ids,))

    def test_a_rewrite(self):
        with pytest.raises(ar.NotAttachedError, match="attach\\(\\) did not add them"):
            ar.as_rewritten(ar.rewrite(small(), (ids,), config=CONFIG, verify=False), (ids,))

    def test_what_is_no_module(self):
        with pytest.raises(TypeError, match="takes an attached nn.Module; this is a dict"):
            ar.as_rewritten({})

    def test_no_inputs(self):
        model, _ = attached()
        with pytest.raises(ValueError, match=r"as_rewritten\(\) captures Gpt .* as_rewritten\(model, args=\(ids,\)\)"):
            ar.as_rewritten(model)

    def test_two_attached_models(self):
        model, _ = attached()
        with pytest.raises(ValueError, match="holds 2 attached models: give one of them"):
            ar.as_rewritten(nn.ModuleList([model, copy.deepcopy(model)]), (ids,))

    def test_a_model_that_grew(self):
        model, _ = attached(small(depth=1))
        model.layers.append(Block(WIDTH).double())
        with pytest.raises(ar.CheckpointError, match=r"It lacks layers\.1\.attn_res\.0\.") as refused:
            ar.as_rewritten(model, (ids,), verify=False)
        assert "not those that attach() found" in str(refused.value)

    def test_a_model_that_shrank(self):
        model, _ = attached(small(depth=2))
        model.layers = model.layers[:1]
        with pytest.raises(ar.NotAttachedError, match=r"the model lost layers\.1\.attn_res\.0\.query"):
            ar.as_rewritten(model, (ids,), verify=False)
