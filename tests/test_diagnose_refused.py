"""Mirrors attnres_rewrite/diagnose.py: what is refused, and what the refusal says to do."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnres_rewrite as ar
from tests.networks import VOCAB, gpt, ids


@pytest.fixture(scope="module")
def new() -> ar.RewrittenModule:
    return ar.rewrite(gpt(), (ids(),), config=ar.AttnResConfig(num_blocks=2), verify=False)


def test_what_is_refused(new):
    with pytest.raises(ar.NotRewrittenError, match=r"This is a Gpt.*\n.*rewrite\(model, args\)"):
        ar.diagnose(gpt(), [ids()])
    with pytest.raises(ar.NotRewrittenError):
        ar.depth_weights(gpt(), ids())
    with pytest.raises(ar.NotRewrittenError, match=r"a Sequential around one\.\n.*RewrittenModule itself"):
        ar.diagnose(nn.Sequential(new), [ids()])
    with pytest.raises(ValueError, match="there is no batch"):
        ar.diagnose(new, [])
    with pytest.raises(ValueError, match="max_batches=0 must be at least 1"):
        ar.diagnose(new, [ids()], max_batches=0)
    with pytest.raises(TypeError, match=r"this Tensor is one: give \[batch\]"):
        ar.diagnose(new, ids())
    with pytest.raises(TypeError, match="also takes ids"):
        ar.diagnose(new, [{}])
    for wrong, says in (
        ({"batches": None}, "batches is an iterable of batches; got NoneType"),
        ({"max_batches": 2.0}, "max_batches=2.0 must be an integer"),
        ({"loss_fn": "cross_entropy"}, r"called as loss_fn\(outputs, batch\); got str"),
    ):
        with pytest.raises(TypeError, match=says):
            ar.diagnose(new, **({"batches": [ids()]} | wrong))


def test_a_batch_that_cannot_be_run_is_named(new):
    with pytest.raises(IndexError, match="out of range") as refused:
        ar.diagnose(new, [ids(), ids(3, 4) + VOCAB])
    (note,) = refused.value.__notes__
    low, high = VOCAB + int(ids(3, 4).min()), VOCAB + int(ids(3, 4).max())
    assert note.startswith(
        f"in batch 1, int64 [3, 4] from {low} to {high}; the network was captured on int64 [2, 5] from"
    )


def test_a_dataset_without_an_iterator(new):
    class MapStyle:
        def __getitem__(self, index: int) -> Tensor:
            if index > 1:
                raise IndexError
            return ids()

    assert ar.diagnose(new, MapStyle()).num_batches == 2


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, **size, use_cache=False, tie_word_embeddings=True))


def _trained(network: str) -> tuple[nn.Module, ar.AttnResConfig, tuple[Any, ...], dict[str, Any]]:
    """An attached model after a step, its config, and example inputs."""
    if network == "llama":
        config = ar.AttnResConfig(block_size=2, key_norm=False, param_dtype=torch.float64)
        model, args, kwargs = _llama(), (), {"input_ids": ids(2, 5), "labels": ids(2, 5)}
    else:
        config = ar.AttnResConfig(num_blocks=2, gate=True)
        model, args, kwargs = gpt(2), (ids(),), {}
    ar.attach(model, config, args, kwargs)
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn(parameter.shape))
    return model, config, args, kwargs


@pytest.mark.parametrize(("network", "compiled"), [("gpt", False), ("gpt", True), ("llama", False)])
def test_an_attached_model_is_refused_with_code_that_works(network, compiled):
    model, config, args, kwargs = _trained(network)
    given = torch.compile(model, backend="attnres") if compiled else model
    batches = [kwargs or args[0]]
    with pytest.raises(ar.NotRewrittenError, match=r"with reads that attach\(\) added; they run under") as refused:
        ar.diagnose(given, batches)
    (spelled,) = re.findall(r"Diagnose  (.*)  , which has the same parameters", str(refused.value))
    new = eval(spelled, {"attnres_rewrite": ar, "model": given, "args": args, "kwargs": kwargs})
    assert ar.diagnose(new.eval(), batches).config == config
    # what the message did not touch
    with pytest.raises(ar.NotCompiledError):
        model(*args, **kwargs)


def test_what_holds_an_attached_model_is_refused_by_its_name():
    model, *_ = _trained("gpt")
    with pytest.raises(ar.NotRewrittenError, match=r"as_rewritten\(model.get_submodule\(\"1\"\), args, kwargs\)"):
        ar.diagnose(nn.Sequential(nn.Identity(), model), [ids()])
