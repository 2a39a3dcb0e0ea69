"""Mirrors attnres_rewrite/host_random.py: draws that a graph would freeze."""

import random

import numpy as np
import pytest
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
