"""Layers under no_grad or autocast in a forward, which torch.export hides in one call: refused, or left alone."""

import contextlib
import inspect

import pytest
import torch

import attnres_rewrite as ar
from tests.networks import VOCAB, Block, Gpt

CONFIG = ar.AttnResConfig(num_blocks=2)
ids = torch.arange(16).reshape(2, 8) % VOCAB


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


class Within(Gpt):
    """Runs the layers of `where` under a context, and makes a table under it, too."""

    def __init__(self, context, where, depth=3):
        super().__init__(depth)
        self.context, self.where = context, where

    def forward(self, ids):
        x = self.embed(ids)
        with self.context():
            scale = (torch.arange(8) + 1.0).cos().mean() + 1.0
        for number, layer in enumerate(self.layers):
            with self.context() if number in self.where else contextlib.nullcontext():
                x = layer(x)
        return self.head(self.norm(x) * scale)


@pytest.mark.parametrize("context", [torch.no_grad, autocast])
@pytest.mark.parametrize("where", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_stream_that_goes_through_is_refused(context, where):
    model = Within(context, where)
    with pytest.raises(ar.StreamRegionError, match=r"the stream goes through .*\n.*[26] of its adds") as refusal:
        ar.inspect(model, (ids,), config=CONFIG, dynamic_shapes={})
    _, first = inspect.getsourcelines(Block.forward)
    assert f"networks.py:{first + 1}\n" in str(refusal.value)
    assert ("requires_grad_(False)" if context is torch.no_grad else "around the call") in str(refusal.value)


def test_tables_do_no_harm():
    report = ar.inspect(Within(torch.no_grad, ()), (ids,), config=CONFIG, dynamic_shapes={})
    assert report.streams[0].num_updates == 6


class Frozen(Gpt):
    """Adds what a frozen model makes of the same ids to its embedding."""

    def __init__(self):
        super().__init__(depth=2)
        self.frozen = Gpt(depth=2)

    def forward(self, ids):
        with torch.no_grad():
            seen = self.frozen(ids)
        x = self.embed(ids) + seen @ self.embed.weight
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def test_a_stream_of_its_own_is_left_alone_with_a_reason():
    report = ar.inspect(Frozen(), (ids,), config=CONFIG, dynamic_shapes={})
    assert [stream.num_updates for stream in report.streams] == [4]
    reasons = [add for add in report.left_alone if "a change of the gradient mode" in add.reason]
    assert len(reasons) == 4
    assert all("networks.py" in add.source_line and add.owner.startswith("frozen.layers") for add in reasons)


class Chosen(Gpt):
    """Runs its layers `where` only when told to: the sum is chosen, or what the layer adds."""

    def __init__(self, where, in_branch=False):
        super().__init__(depth=3)
        self.where, self.in_branch = where, in_branch

    def forward(self, ids, wanted):
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            if number not in self.where:
                x = layer(x)
            elif self.in_branch:
                x = x + torch.cond(wanted, lambda x, mlp=layer.mlp: mlp(x), torch.zeros_like, (self.norm(x),))
            else:
                x = torch.cond(wanted, lambda x, layer=layer: layer(x), torch.clone, (x,))
        return self.head(self.norm(x))


@pytest.mark.parametrize("where", [(1,), (2,), (0, 1, 2)])
def test_a_stream_that_is_chosen_by_cond_is_refused(where):
    with pytest.raises(ar.StreamRegionError, match=r"the stream goes through torch.cond(.|\n)*Choose in the branch"):
        ar.inspect(Chosen(where), (ids, torch.tensor(True)), config=CONFIG, dynamic_shapes={})


def test_an_update_that_is_chosen_by_cond_is_an_update():
    report = ar.inspect(Chosen((1,), in_branch=True), (ids, torch.tensor(True)), config=CONFIG, dynamic_shapes={})
    assert report.streams[0].num_updates == 5
