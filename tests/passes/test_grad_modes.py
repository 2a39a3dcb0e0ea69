"""Gradients that the forward turns off for a part of the stream: refused by the backend, and in a traced graph."""

import inspect

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.experimental.proxy_tensor import make_fx

import attnres_rewrite as ar
from tests.networks import VOCAB, Block, Gpt

CONFIG = ar.AttnResConfig(num_blocks=2)
ids = torch.arange(16).reshape(2, 8) % VOCAB


class Frozen(Gpt):
    """Runs its first layers, or its head, without gradients when told to; and makes a table without, always."""

    def forward(self, ids, layers=0, head=True):
        x = self.embed(ids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not layers):
            for layer in self.layers[: layers or 1]:
                x = layer(x)
        for layer in self.layers[layers or 1 :]:
            with torch.no_grad():
                scale = (torch.arange(ids.shape[1]) + 1).sum() * 0.0 + 1.0
            x = layer(x * scale)
        with torch.set_grad_enabled(torch.is_grad_enabled() and head):
            return self.head(self.norm(x))


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    model = Frozen(depth=3).double()
    ar.attach(model, CONFIG, (ids,))
    model.compile(backend="attnres", options={"backend": "aot_eager"})
    return model


def test_lower_layers_without_gradients(compiled):
    with pytest.raises(BackendCompilerFailed, match="StreamRegionError: gradients are off for a part of stream") as why:
        compiled(ids, layers=2)
    _, first = inspect.getsourcelines(Block.forward)
    assert f"networks.py:{first + 1}\n" in str(why.value)
    assert "requires_grad_(False)" in str(why.value)


def test_a_reader_without_gradients(compiled):
    with pytest.raises(BackendCompilerFailed, match="StreamRegionError"):
        compiled(ids, head=False)


def test_what_is_beside_the_stream_is_left_alone(compiled):
    plain = Frozen(depth=3).double()
    plain.load_state_dict({name: value for name, value in compiled.state_dict().items() if "attn_res" not in name})
    for model in (plain, compiled):
        model(ids).square().mean().backward()
    gradients = dict(compiled.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad)


def test_a_whole_call_without_gradients(compiled):
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, layers=2), compiled(ids))


def test_a_graph_of_another_tracer():
    model = Gpt(depth=3)

    def forward(x):
        with torch.no_grad():
            x = model.layers[0](x)
        return model.norm(model.layers[2](model.layers[1](x)))

    traced = make_fx(forward, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(
        torch.randn(2, 8, 16)
    )
    with pytest.raises(ar.StreamRegionError):
        ar.inspect(traced, (torch.randn(2, 8, 16),), config=CONFIG)
