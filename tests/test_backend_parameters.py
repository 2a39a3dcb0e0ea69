"""Queries that are not plain parameters any more when a call is compiled: read as they are, or refused by name."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.utils import parametrize

import attnres_rewrite as ar
from tests.networks import VOCAB, Gpt

CONFIG = ar.AttnResConfig(num_blocks=2)
QUICK = {"backend": "attnres", "options": {"backend": "aot_eager"}}
ids = torch.arange(16).reshape(2, 8) % VOCAB


@pytest.fixture
def model():
    torch._dynamo.reset()
    model = Gpt(depth=2).double()
    ar.attach(model, CONFIG, (ids,))
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    return model


def test_functional_call(model):
    state = {name: value.detach().clone() for name, value in model.named_parameters()}

    def call(state):
        return torch.func.functional_call(model, state, (ids,))

    found = torch.compile(call, **QUICK)(state)
    moved = {name: value + 1.0 if name.endswith("query") else value for name, value in state.items()}
    other = torch.compile(call, **QUICK)(moved)
    torch.testing.assert_close(torch.compile(model, **QUICK)(ids), found)
    model.load_state_dict(moved, strict=False)
    torch.testing.assert_close(torch.compile(model, **QUICK)(ids), other)
    assert not torch.allclose(found, other)


def test_symbolic_trace(model):
    with pytest.raises(ar.NotCompiledError, match="symbolic_trace"):
        torch.fx.symbolic_trace(model)


def test_tied_queries(model):
    holders = [layer.attn_res.get_submodule("0") for layer in model.layers]
    holders[1].query = holders[0].query
    model.compile(**QUICK)
    with pytest.raises(BackendCompilerFailed, match=r"layers\.0\.attn_res\.0\.query and layers\.1\.attn_res\.0\.query"):
        model(ids)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def test_a_parametrized_query(model):
    parametrize.register_parametrization(model.layers[0].attn_res.get_submodule("0"), "query", Doubled())
    model.compile(**QUICK)
    with pytest.raises(BackendCompilerFailed, match=r"layers\.0\.attn_res\.0\.query is computed in this call"):
        model(ids)


def test_a_sibling_that_is_compiled_with_it(model):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = model, Gpt(depth=2).double()

        def forward(self, ids):
            return self.one(ids) + self.other(ids)

    with pytest.raises(BackendCompilerFailed, match="compile it alone"):
        torch.compile(Pair(), **QUICK)(ids)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_checkpoint_of_a_wrapped_model(model, prefix):
    state = {f"{prefix}{name}": value + 1.0 for name, value in model.state_dict().items()}
    before = [parameter.clone() for parameter in ar.attnres_parameters(model)]
    ar.load_attnres_parameters(torch.compile(model, **QUICK), state)
    for old, new in zip(before, ar.attnres_parameters(model), strict=True):
        torch.testing.assert_close(new, old + 1.0)
