"""A compiled call has to run the modules that attach() saw, in their order: each read belongs to one of them."""

from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import attnres_rewrite as ar
from tests.networks import VOCAB, WIDTH, Block, Gpt

CONFIG = ar.AttnResConfig(num_blocks=2)
QUICK = {"backend": "attnres", "options": {"backend": "aot_eager"}}
ids = torch.arange(16).reshape(2, 8) % VOCAB


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


class Ordered(Gpt):
    """Runs the layers it is told to."""

    def forward(self, ids, order=(0, 1, 2)):
        x = self.embed(ids)
        for number in order:
            x = self.layers[number](x)
        return self.head(self.norm(x))


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.parts = nn.ModuleList([inner])

    def forward(self, *args, **kwargs):
        return self.parts[0](*args, **kwargs) * 2


def attached(model):
    ar.attach(model, CONFIG, (ids,), {"order": (0, 1)})
    return model


@pytest.mark.parametrize(("order", "read"), [((1, 0), "layers.1"), ((1, 2), "layers.1"), ((0, 0), "layers.0")])
@pytest.mark.parametrize("outer", [False, True])
def test_other_layers_than_attach_saw(order, read, outer):
    model = attached(Ordered())
    model = Outer(model) if outer else model
    model.compile(**QUICK)
    with pytest.raises(BackendCompilerFailed, match=f"StreamMismatchError: state . of stream is read by {read}"):
        model(ids, order=order)
    model(ids, order=(0, 1))


def test_the_model_is_found_wherever_it_is():
    model = attached(Ordered(depth=2))
    holder, held = SimpleNamespace(models=[model]), {"model": model}
    with ar.original(model):
        wanted = model(ids, order=(0, 1))
    calls = (
        lambda: model(ids, order=(0, 1)),
        lambda: holder.models[0](ids, order=(0, 1)),
        lambda: held["model"](ids, order=(0, 1)),
        lambda: Outer(Outer(model))(ids, order=(0, 1)) / 4,
    )
    for call in calls:
        torch.testing.assert_close(torch.compile(call, **QUICK)(), wanted)


def test_what_the_model_returns_is_read_outside_of_it():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm = Body(), nn.LayerNorm(WIDTH)

        def forward(self, x):
            return self.norm(self.body(x))

    model, x = Outer(Head()), torch.randn(2, 4, WIDTH)
    wanted = model(x)
    ar.attach(model.parts[0].body, CONFIG, (x,))
    model.compile(**QUICK)
    torch.testing.assert_close(model(x), wanted)


def test_a_shared_module_goes_by_every_name():
    class Shared(Gpt):
        def __init__(self):
            super().__init__(depth=2)
            self.first = self.layers[0]

        def forward(self, ids, by_name=False):
            x = (self.first if by_name else self.layers[0])(self.embed(ids))
            return self.head(self.norm(self.layers[1](x)))

    model = Shared()
    ar.attach(model, CONFIG, (ids,))
    model.compile(**QUICK)
    torch.testing.assert_close(model(ids, by_name=True), model(ids))


def test_layers_that_were_wrapped_later():
    model = attached(Ordered(depth=2))
    model.compile(**QUICK)
    wanted = model(ids, order=(0, 1))
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    torch.testing.assert_close(model(ids, order=(0, 1)), wanted)


def test_blocks_counted_in_layers():
    model = Gpt(depth=3)
    ar.attach(model, ar.AttnResConfig(block_layers=2), (ids,))
    model.compile(**QUICK)
    with ar.original(model):
        wanted = model(ids)
    torch.testing.assert_close(model(ids), wanted)


def test_a_function_around_the_forward(monkeypatch):
    model = attached(Ordered(depth=2))
    with ar.original(model):
        wanted = model(ids, order=(0, 1))
    inner = type(model).forward
    monkeypatch.setattr(model, "forward", MethodType(lambda *args, **kwargs: inner(*args, **kwargs), model))
    torch.testing.assert_close(torch.compile(model.forward, **QUICK)(ids, order=(0, 1)), wanted)
    holder = SimpleNamespace(models=[model])
    call = torch.compile(lambda: inner(holder.models[0], ids, order=(0, 1)), **QUICK)
    torch.testing.assert_close(call(), wanted)
    with pytest.raises(BackendCompilerFailed, match=r"is read by layers\.1 in this call"):
        torch.compile(lambda: inner(holder.models[0], ids, order=(1, 0)), **QUICK)()
