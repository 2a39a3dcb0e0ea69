"""Layers whose methods are called, as checkpoints of diffusers do: Dynamo names what is in them, and not them."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import attnres_rewrite as ar
from tests.networks import Gpt, ids

QUICK = {"backend": "attnres", "options": {"backend": "aot_eager"}}
CALLS = {
    "module": lambda layer: layer,
    "call": lambda layer: layer.__call__,
    "forward": lambda layer: layer.forward,
    "function": lambda layer: lambda x: layer(x),
}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


class Checkpointed(Gpt):
    """Runs layers in an order, under checkpoints where `call` says how."""

    call = None
    order = (0, 1, 2)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in (self.layers[number] for number in self.order):
            x = layer(x) if self.call is None else checkpoint(CALLS[self.call](layer), x, use_reentrant=False)
        return self.head(self.norm(x))


def attached(config, model=None):
    model = model or Checkpointed().double()
    ar.attach(model, config, (ids(),))
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    return model


def gradients(model, of):
    model.zero_grad()
    of(ids()).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_those_without_checkpoints(call):
    model = attached(ar.AttnResConfig(num_blocks=2))
    new = ar.as_rewritten(model, (ids(),))
    wanted = gradients(new, new)
    model.call = call
    model.compile(**QUICK)
    torch.testing.assert_close(gradients(model, model), wanted, rtol=1e-10, atol=1e-10)


class Bare(nn.Module):
    """Its state goes into no module first."""

    def __init__(self, mlp):
        super().__init__()
        self.up, self.down = mlp.up, mlp.down

    def forward(self, x):
        h = torch.nn.functional.rms_norm(x, x.shape[-1:])
        return x + self.down(self.up(h).tanh())


@pytest.mark.parametrize("call", ["call", "forward"])
def test_a_layer_is_known_by_what_runs_in_its_checkpoint(call):
    model = Checkpointed().double()
    model.layers = nn.ModuleList([Bare(layer.mlp) for layer in model.layers])
    model = attached(ar.AttnResConfig(num_blocks=2), model)
    new = ar.as_rewritten(model, (ids(),))
    wanted = gradients(new, new)
    model.call = call
    model.compile(**QUICK)
    torch.testing.assert_close(gradients(model, model), wanted, rtol=1e-10, atol=1e-10)
    model.order = (1, 0, 2)
    with pytest.raises(BackendCompilerFailed, match="state 1 of stream is read by"):
        model(ids())


@pytest.mark.parametrize("call", ["call", "forward"])
def test_another_order_is_refused(call):
    model = attached(ar.AttnResConfig(num_blocks=2))
    model.call, model.order = call, (1, 0, 2)
    model.compile(**QUICK)
    with pytest.raises(BackendCompilerFailed, match=r"(?s)state 1 of stream is read by .*checkpoint\(layer, x\)"):
        model(ids())


def test_layers_that_are_not_named_are_not_counted():
    model = attached(ar.AttnResConfig(block_layers=2))
    model.call = "forward"
    model.compile(**QUICK)
    with pytest.raises(BackendCompilerFailed, match="(?s)block_layers counts numbered layers .* use block_size"):
        model(ids())


class Nested(nn.Module):
    """Two numbered layers in one: without the name of the outer one they would count as two."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_blocks_of_other_layers_than_attach_counted_are_refused():
    model = Checkpointed(depth=4)
    model.layers = nn.ModuleList([Nested(model.layers[:2]), Nested(model.layers[2:])])
    model.order = (0, 1)
    model = attached(ar.AttnResConfig(block_layers=1), model)
    model.call = "forward"
    model.compile(**QUICK)
    with pytest.raises(BackendCompilerFailed, match="the blocks of stream end at updates 2, 4, 6, 8 in this call"):
        model(ids())
