"""Mirrors attnres_rewrite/diagnose.py: what it says of an attached model, which it does not run."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import attnres_rewrite as ar
from tests.networks import gpt, ids


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
    lines = [line.strip() for line in str(refused.value).splitlines() if line.startswith("    ")]
    assert len(lines) == 5
    names = {"copy": copy, "torch": torch, "attnres_rewrite": ar, "model": given, "args": args, "kwargs": kwargs}
    names |= {"batches": batches}
    exec("\n".join(lines), names)
    assert names["diagnosis"].config == config
    values = names["new"].state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(values[name], value), name
    # what the message did not touch
    with pytest.raises(ar.NotCompiledError):
        model(*args, **kwargs)
    names["twin"](*args, **kwargs)


def test_what_holds_an_attached_model_is_refused_by_its_name():
    model, *_ = _trained("gpt")
    with pytest.raises(ar.NotRewrittenError, match=r"twin = copy.deepcopy\(model.get_submodule\(\"1\"\)\)"):
        ar.diagnose(nn.Sequential(nn.Identity(), model), [ids()])
