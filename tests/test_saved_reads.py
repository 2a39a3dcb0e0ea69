"""Mirrors attnres_rewrite/saved_reads.py: attach() loads the queries of the checkpoint that the model was read from."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import attnres_rewrite as ar

transformers = pytest.importorskip("transformers")

CONFIG = ar.AttnResConfig(num_blocks=2)
SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
Llama = transformers.LlamaForCausalLM


def trained(seed: int, weights: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(seed)
    model = Llama(transformers.LlamaConfig(**SIZES))
    if weights is not None:
        model.load_state_dict(weights.state_dict(), strict=False)
    ar.attach(model, CONFIG)
    draw(model)
    return model


def draw(model: nn.Module) -> None:
    for parameter in ar.attnres_parameters(model):
        nn.init.normal_(parameter)


def reads(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach() for parameter in ar.attnres_parameters(model)])


def attached(model: nn.Module) -> nn.Module:
    """Attach without a word of warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ar.attach(model)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, nn.Module]]:
    folder = tmp_path_factory.mktemp("saved")
    models = {"early": trained(1), "final": trained(2), "average": trained(3)}
    models["early"].save_pretrained(folder / "checkpoint-10")
    models["final"].save_pretrained(folder)
    models["final"].save_pretrained(folder / "checkpoint-20")
    models["average"].save_pretrained(folder, variant="zz")
    (folder / "checkpoint-30").mkdir()
    (folder / "checkpoint-30" / "model.safetensors").write_bytes(b"cut short")
    return folder, models


# Once wrong: the queries of the folder, or those of the last file in it, whatever had been read
@pytest.mark.parametrize(
    ("which", "where"),
    [("final", {}), ("early", {"subfolder": "checkpoint-10"}), ("average", {"variant": "zz"})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_queries_are_those_of_the_weights(saved, which, where, dtype):
    folder, models = saved
    model = attached(Llama.from_pretrained(folder, dtype=dtype, **where))
    own = reads(model)
    assert torch.equal(own, reads(models[which]).to(own.dtype))


def test_a_head_drawn_anew_and_a_larger_vocabulary_do_no_harm(saved):
    folder, models = saved
    model = Llama.from_pretrained(folder)
    model.resize_token_embeddings(80)
    nn.init.normal_(model.lm_head.weight)
    assert torch.equal(reads(attached(model)), reads(models["final"]))


def test_a_model_that_read_no_weights_gets_no_queries(saved):
    folder, _ = saved
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    with pytest.warns(UserWarning, match=r"the weights of this LlamaForCausalLM are those of no checkpoint there"):
        ar.attach(model)
    queries = [value for name, value in model.named_parameters() if name.endswith("query")]
    assert not any(query.any() for query in queries)


def test_checkpoints_that_differ_in_their_queries_alone_are_named(tmp_path):
    final = trained(1)
    final.save_pretrained(tmp_path)
    trained(2, weights=final).save_pretrained(tmp_path / "checkpoint-10")
    model = Llama.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"checkpoint-10/model.safetensors has the same weights and other queries"):
        ar.attach(model)
    assert torch.equal(reads(model), reads(final))


def test_shards_are_one_checkpoint(tmp_path):
    model = trained(1)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(reads(attached(Llama.from_pretrained(tmp_path))), reads(model))


# Once refused: the names in the folder begin with those of the parts
def test_an_encoder_and_a_decoder_are_attached_again(tmp_path):
    sizes = {"vocab_size": 67, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ids, states = torch.randint(3, 67, (2, 9)), torch.randn(2, 9, 32)

    def attach(model):
        ar.attach(model.encoder, CONFIG)
        ar.attach(model.decoder, CONFIG, kwargs={"input_ids": ids, "encoder_hidden_states": states, "use_cache": False})

    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    attach(model)
    draw(model)
    model.save_pretrained(tmp_path)
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    attach(again)
    assert torch.equal(reads(again), reads(model))
