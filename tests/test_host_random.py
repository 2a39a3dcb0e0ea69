"""Mirrors attnres_rewrite/host_random.py: draws that a graph would freeze."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

import attnres_rewrite as ar
from tests.networks import Gpt, gpt, ids


class LayerDrop(Gpt):
    """Skips layers at random in train mode; this one hardly ever does."""

    def draw(self) -> float:
        return random.random()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            if self.training and self.draw() < 1e-9:
                continue
            x = layer(x)
        return self.head(self.norm(x))


class LayerDropOfNumpy(LayerDrop):
    def draw(self) -> float:
        return float(np.random.rand())


@pytest.mark.parametrize(("kind", "name"), [(LayerDrop, "random"), (LayerDropOfNumpy, "numpy.random")])
def test_a_draw_that_the_capture_would_freeze_is_refused(kind, name):
    with pytest.raises(ar.CaptureError, match=f"draws from {name}\n"):
        ar.rewrite(kind(2).train(), (ids(),))


def test_a_draw_in_the_other_mode_leaves_that_mode_out():
    new = ar.rewrite(LayerDrop(2).eval(), (ids(),), dynamic_shapes={})
    assert set(new.programs) == {False}
    assert "draws from random" in new.report.capture.notes[0]


def test_generators_are_left_as_they_were():
    before = random.getstate(), np.random.get_state()[1].tolist()
    for model in (gpt(1), LayerDrop(1).train(), LayerDropOfNumpy(1).train()):
        try:
            ar.inspect(model, (ids(),), dynamic_shapes={})
        except ar.CaptureError:
            continue
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


class Unused(LayerDrop):
    """Draws in both modes, and skips layers in train mode alone, with a probability."""

    probability = 0.0

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            drawn = self.draw()
            if self.training and drawn < self.probability:
                continue
            x = layer(x)
        return self.head(self.norm(x))


class UnusedOfNumpy(Unused):
    """As in wav2vec2."""

    def draw(self) -> float:
        return np.random.uniform(0, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            drawn = self.draw()
            if not self.training or drawn > self.probability:
                x = layer(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize("kind", [Unused, UnusedOfNumpy])
def test_a_draw_that_nothing_depends_on_is_let_through(kind):
    new = ar.rewrite(kind(2).train(), (ids(),), dynamic_shapes={})
    assert set(new.programs) == {True, False}
    assert new.report.streams[0].num_updates == 4


@pytest.mark.parametrize(("kind", "name"), [(Unused, "random"), (UnusedOfNumpy, "numpy.random")])
def test_a_draw_that_one_mode_depends_on_leaves_that_mode_out(kind, name):
    model = kind(2).eval()
    model.probability = 0.1
    assert set(ar.rewrite(model, (ids(),), dynamic_shapes={}).programs) == {False}
    with pytest.raises(ar.CaptureError, match=f"draws from {name}\n"):
        ar.rewrite(model.train(), (ids(),))


@pytest.mark.parametrize(
    "use",
    [
        lambda x, drawn: x * drawn,
        lambda x, drawn: x + (1 - drawn),
        lambda x, drawn: x * float(drawn),
        lambda x, drawn: x * torch.tensor(drawn),
        lambda x, drawn: x.clamp(max=drawn),
        lambda x, drawn: x if drawn == 0.5 else -x,
        lambda x, drawn: x if drawn else -x,
        lambda x, drawn: torch.dropout(x, drawn, True),
        lambda x, drawn: x if drawn >= 0.1 else -x,
    ],
)
def test_every_use_of_a_draw_is_refused(use):
    class Used(Gpt):
        def forward(self, ids: Tensor) -> Tensor:
            return use(super().forward(ids), random.uniform(0, 1))

    with pytest.raises(ar.CaptureError, match="draws from random"):
        ar.rewrite(Used(2), (ids(),), dynamic_shapes={})


def test_functions_are_put_back():
    before = random.random, random.uniform, np.random.random, np.random.rand, np.random.uniform
    ar.inspect(Unused(1).train(), (ids(),), dynamic_shapes={})
    with pytest.raises(ar.CaptureError):
        ar.inspect(LayerDrop(1).train(), (ids(),), dynamic_shapes={})
    assert (random.random, random.uniform, np.random.random, np.random.rand, np.random.uniform) == before
    assert isinstance(random.random(), float)
