"""Mirrors attnres_rewrite/page/learnt.py: what is said of a diagnosis, and whose it is."""

from dataclasses import replace

import pytest

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.diagnosis import Diagnosis, ReadDiagnosis, StreamDiagnosis
from attnres_rewrite.errors import ArtifactError
from attnres_rewrite.page.learnt import UNKNOWN, check_same_network, learnt_terms
from attnres_rewrite.records import ReadGroup
from attnres_rewrite.report import CaptureReport, ReadReport, RewriteReport, StreamReport

READ = ReadDiagnosis(
    "attn_res.0", 3, "", "", ("embedding", "block 1", "partial"), (0.2,) * 3, (0.0,) * 3, 1.0, 2.0, 1.0
)
STREAM = StreamDiagnosis("stream", 8, 1200, ((1, 2), (3, 3)), 1.0, 1.0, (READ,), ())
CONFIG = AttnResConfig(num_blocks=2)
LEARNT = Diagnosis("Tiny", "eval", 50, 0, (), 2.34567, "own", 2.5, (STREAM,), CONFIG, "given")
REPORT = RewriteReport(
    model="Tiny",
    config={"block_size": 2, "schedule": "direct"},  # the same blocks, asked for in another way
    capture=CaptureReport("", ("eval",), 42, (), 0.25),
    streams=(
        StreamReport(
            "stream",
            8,
            "float32",
            3,
            {"residual": 3},
            ((1, 2), (3, 3)),
            (ReadReport(3, "", "", 3, "attn_res.0.query", "direct", (), ""),),
            (ReadGroup(("attn_res.0",), 3, 0, "direct", 640, 992),),
            "",
        ),
    ),
    left_alone=(),
    num_parameters_added=16,
    pass_seconds=0.01,
)


def test_mode_batches_loss_original_and_choices():
    assert learnt_terms(LEARNT) == [
        ("Mode", "eval"),
        ("Batches", "50, with 1,200 tokens in the figures"),
        ("Loss", "2.3457: of a loss_fn that was given"),
        ("Original", "the original with the same parameters, with a loss of 2.5000"),
        ("Choices", "num_blocks=2, output=sum, key_norm=True, eps=1e-06, schedule=auto"),
    ]


@pytest.mark.parametrize(
    ("change", "term", "says"),
    [
        ({"mode": "train"}, "Mode", "train"),
        (
            {"num_nonfinite": 3, "nonfinite_batches": (0, 7)},
            "Batches",
            "50, with 1,200 tokens in the figures; 3 not finite and in no figure, counted from 0: 0, 7, ...",
        ),
        ({"loss_kind": "default"}, "Loss", "2.3457: the outputs' own, or the next-token cross-entropy"),
        (
            {"baseline": "given"},
            "Original",
            "a twin that was trained without the rewrite, with a loss of 2.5000",
        ),
        ({"baseline": "", "baseline_loss": None}, "Original", "not run"),
        # a file of format 1
        ({"loss_kind": ""}, "Loss", f"2.3457: {UNKNOWN}"),
        ({"config": None}, "Choices", UNKNOWN),
    ],
)
def test_each_of_them(change, term, says):
    assert dict(learnt_terms(replace(LEARNT, **change)))[term] == says


def test_blocks_may_be_asked_for_in_several_ways():
    check_same_network(LEARNT, REPORT)
    check_same_network(replace(LEARNT, config=None), REPORT)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"streams": (replace(STREAM, width=16),)}, r"of widths \[16\], and Tiny has 1 of \[8\]"),
        ({"streams": (replace(STREAM, reads=(replace(READ, name="x"),)),)}, "It has x with 3 sources where Tiny has"),
        ({"config": replace(CONFIG, output="mean")}, r"Its reads mix with output=mean.* Tiny with output=sum"),
        ({"config": replace(CONFIG, recency_bias=1.0)}, r"Its reads mix with .*recency_bias=1.0"),
    ],
)
def test_the_diagnosis_of_another_network_is_refused(change, says):
    with pytest.raises(ArtifactError, match=rf"this is the diagnosis of another model\n.*{says}"):
        check_same_network(replace(LEARNT, **change), REPORT)
