import pytest
import torch
from safetensors.torch import save_file

import attnres_rewrite as ar
from tests.networks import Gpt

ids = torch.arange(16).reshape(2, 8)


def attached(num_blocks=2, depth=2):
    model = Gpt(depth=depth)
    ar.attach(model, ar.AttnResConfig(num_blocks=num_blocks), (ids,))
    return model


def drawn(model):
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    return model


def test_they_are_the_queries_and_gains_of_the_model_itself():
    model = attached()
    names = [name for name, _ in model.named_parameters() if ".attn_res." in f".{name}"]
    found = ar.attnres_parameters(model)
    assert len(found) == len(names) == 8
    assert all(one is model.get_parameter(name) for one, name in zip(found, names, strict=True))


def test_of_a_rewritten_module():
    assert len(ar.attnres_parameters(ar.rewrite(Gpt(depth=2), (ids,), verify=False, dynamic_shapes={}))) == 8


@pytest.mark.parametrize("form", ["dict", "file", "folder", "sharded"])
def test_loading_leaves_everything_else_alone(form, tmp_path):
    trained, model = drawn(attached()), attached()
    embedding = model.embed.weight.clone()
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    source = state
    if form != "dict":
        source = tmp_path / "model.safetensors" if form == "file" else tmp_path
        half = len(state) // 2 if form == "sharded" else len(state)
        names = list(state)
        save_file({name: state[name] for name in names[:half]}, tmp_path / "model.safetensors")
        if form == "sharded":
            save_file({name: state[name] for name in names[half:]}, tmp_path / "model-2.safetensors")
    ar.load_attnres_parameters(model, source)
    for one, other in zip(ar.attnres_parameters(model), ar.attnres_parameters(trained), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(model.embed.weight, embedding, rtol=0, atol=0)


def test_a_checkpoint_that_lacks_them():
    model = attached()
    with pytest.raises(ar.ArtifactError, match=r"lacks attn_res\.0\.key_norm, one of 8"):
        ar.load_attnres_parameters(model, Gpt(depth=2).state_dict())


def test_a_checkpoint_of_a_deeper_model():
    with pytest.raises(ar.ArtifactError, match=r"has layers\.2\.attn_res\.0\.key_norm, one of 4"):
        ar.load_attnres_parameters(attached(), attached(depth=3).state_dict())


def test_a_checkpoint_of_another_width():
    state = attached().state_dict()
    state["attn_res.0.query"] = torch.zeros(3)
    model = attached()
    before = [parameter.clone() for parameter in ar.attnres_parameters(model)]
    with pytest.raises(ar.ArtifactError, match=r"\[3\] in the checkpoint, \[16\] here"):
        ar.load_attnres_parameters(model, state)
    assert all(torch.equal(a, b) for a, b in zip(before, ar.attnres_parameters(model), strict=True))


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_path_that_holds_nothing(tmp_path, name):
    with pytest.raises(ar.ArtifactError, match="no safetensors file"):
        ar.load_attnres_parameters(attached(), tmp_path / name)


def test_a_model_without_reads():
    with pytest.raises(ar.NotAttachedError):
        ar.load_attnres_parameters(Gpt(), {})


class TestHuggingFace:
    @pytest.fixture
    def llama(self):
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)
        return transformers.LlamaForCausalLM(config).eval()

    def test_config_and_queries_come_back_from_the_folder(self, llama, tmp_path):
        ar.attach(llama, ar.AttnResConfig(num_blocks=3, output="mean"))
        drawn(llama).save_pretrained(tmp_path)
        again = type(llama).from_pretrained(tmp_path)
        report = ar.attach(again)
        assert report.config["num_blocks"] == 3
        assert report.config["output"] == "mean"
        for one, other in zip(ar.attnres_parameters(again), ar.attnres_parameters(llama), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    def test_another_config_than_it_was_saved_with(self, llama, tmp_path):
        ar.attach(llama, ar.AttnResConfig(num_blocks=3))
        llama.save_pretrained(tmp_path)
        again = type(llama).from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="contradicts"):
            ar.attach(again, ar.AttnResConfig(num_blocks=2))

    def test_queries_that_cannot_be_found_are_warned_of(self, llama, tmp_path):
        ar.attach(llama, ar.AttnResConfig(num_blocks=3))
        drawn(llama).save_pretrained(tmp_path)
        again = type(llama).from_pretrained(tmp_path)
        again.name_or_path = "somewhere/else"
        with pytest.warns(UserWarning, match="load_attnres_parameters"):
            ar.attach(again)

    def test_queries_of_another_class_are_refused_and_nothing_stays_attached(self, llama, tmp_path):
        ar.attach(llama.model, ar.AttnResConfig(num_blocks=3))
        llama.model.save_pretrained(tmp_path)
        whole = type(llama).from_pretrained(tmp_path)
        with pytest.raises(ar.ArtifactError, match=r"the checkpoint 8, the first is attn_res\.0"):
            ar.attach(whole)
        with pytest.raises(ar.NotAttachedError):
            ar.attnres_parameters(whole)

    def test_the_body_of_a_saved_model_takes_its_queries(self, llama, tmp_path):
        ar.attach(llama, ar.AttnResConfig(num_blocks=3))
        for parameter in ar.attnres_parameters(llama):
            torch.nn.init.normal_(parameter)
        llama.save_pretrained(tmp_path)
        body = type(llama.model).from_pretrained(tmp_path)
        ar.attach(body)
        torch.testing.assert_close(ar.attnres_parameters(body), ar.attnres_parameters(llama), rtol=0, atol=0)

    # peft asks transformers for an attribute by its old name
    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
    def test_an_adapter_that_keeps_its_own(self, llama):
        peft = pytest.importorskip("peft")
        ar.attach(llama, ar.AttnResConfig(num_blocks=3))
        state = {name: value + 1.0 for name, value in llama.state_dict().items()}
        lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["attn_res"])
        adapted = peft.get_peft_model(llama, lora)
        found = ar.attnres_parameters(adapted)
        assert len(found) == 8
        assert all(parameter.requires_grad for parameter in found)
        ar.load_attnres_parameters(llama, state)
        assert all(parameter.ne(0).all() for parameter in ar.attnres_parameters(adapted))

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
    def test_of_several_adapters_those_of_the_active_one(self, llama):
        peft = pytest.importorskip("peft")
        ar.attach(llama, ar.AttnResConfig(num_blocks=3))
        lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["attn_res"])
        adapted = peft.get_peft_model(llama, lora)
        adapted.add_adapter("other", lora)
        for active, idle in (("other", "default"), ("default", "other")):
            adapted.set_adapter(active)
            wanted = [p for name, p in adapted.named_parameters() if f"modules_to_save.{active}" in name]
            assert list(map(id, ar.attnres_parameters(adapted))) == list(map(id, wanted))
            assert not any(
                f"modules_to_save.{idle}" in name and p.requires_grad for name, p in adapted.named_parameters()
            )
        with pytest.raises(ar.ArtifactError, match=r"attn_res\.0\.query twice, the second time as .*other"):
            ar.load_attnres_parameters(adapted, adapted.state_dict())

    def test_detach_forgets_the_config(self, llama):
        ar.attach(llama, ar.AttnResConfig(num_blocks=3))
        ar.detach(llama)
        assert not hasattr(llama.config, "attn_res")
        ar.attach(llama, ar.AttnResConfig(num_blocks=2))


def test_gates_are_among_them_and_loaded():
    def gated():
        model = Gpt(depth=2)
        ar.attach(model, ar.AttnResConfig(num_blocks=2, gate=True), (ids,))
        return model

    trained, model = drawn(gated()), gated()
    assert len(ar.attnres_parameters(model)) == 12
    ar.load_attnres_parameters(model, trained.state_dict())
    assert model.get_parameter("attn_res.0.gate").any()
    plain = ar.rewrite(Gpt(depth=2), (ids,), config=ar.AttnResConfig(num_blocks=2), verify=False, dynamic_shapes={})
    with pytest.raises(ar.ArtifactError, match=r"has attn_res\.0\.gate, one of 4"):
        ar.load_attnres_parameters(plain, trained.state_dict())
