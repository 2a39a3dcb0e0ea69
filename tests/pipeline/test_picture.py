import sys

import pytest

import attnres_rewrite as ar
from attnres_rewrite.errors import MissingPackageError
from tests.pipeline.networks import rewritten


@pytest.fixture(scope="module")
def plan():
    return ar.partition(rewritten("gpt"), 2, 2)


def test_the_picture_shows_every_run_and_every_value(plan):
    time, place = ar.draw_pipeline(plan, "Interleaved1F1B", 4).axes
    # forward and backward of 4 stages and 4 microbatches
    assert len(time.patches) == 32
    assert "4 microbatches" in time.get_title()
    labels = [label.get_text() for label in place.get_yticklabels()]
    assert labels[:2] == ["embedding", "block 1"]
    assert len(labels) == len(plan.values)
    shown = {
        (value.name, routes.stage)
        for value in plan.values
        for routes in plan.routes
        if value.name in {*routes.made, *routes.received, *routes.cached}
    }
    assert len(place.patches) == len(shown)


def test_labels_of_two_streams_are_told_apart():
    labels = {value.label for value in ar.partition(rewritten("t5"), 2).values}
    assert {"stream 1, embedding", "stream 2, embedding"} & labels


def test_without_matplotlib(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"attnres-rewrite\[plot\]"):
        ar.draw_pipeline(plan)
