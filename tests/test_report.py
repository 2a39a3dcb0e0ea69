"""What print() says of a report."""

from dataclasses import replace

import pytest

import attnres_rewrite as ar
from tests.networks import gpt, ids


@pytest.fixture(scope="module")
def new():
    return ar.rewrite(gpt(), (ids(),), config=ar.AttnResConfig(block_size=2))


def test_a_report_is_printed_in_a_few_lines(new):
    first, stream, left_alone, *proofs = str(new.report).split("\n")
    assert first == "Gpt: 192 parameters added in 6 reads"
    assert stream == "  stream: width 16, float32, 6 updates, 6 reads; 3 blocks of updates: 1-2, 3-4, 5-6"
    assert left_alone == "  6 other adds left alone"
    assert [line.partition(", float")[0] for line in proofs] == [
        "  proven: capture, eval mode",
        "  proven: original, eval mode",
        "  proven: independent, eval mode",
    ]


def test_a_report_without_proofs_says_so():
    assert str(ar.inspect(gpt(), (ids(),))).endswith("\n  no proof was run")


def test_a_proof_that_failed_says_so(new):
    failed = replace(new.report.verify.proofs[0], output_error=1.0)
    assert str(failed).startswith("FAILED: capture, eval mode, float32: error of outputs 1e+00, ")


def test_notes_are_printed(new):
    noted = replace(new.report, verify=replace(new.report.verify, notes=("in float32",)))
    assert str(noted).endswith("\n  note: in float32")
    biased = ar.inspect(gpt(), (ids(),), config=ar.AttnResConfig(recency_bias=1.0))
    assert "\n  note: the rewritten network does NOT start as the original" in str(biased)
