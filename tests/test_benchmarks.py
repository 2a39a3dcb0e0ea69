"""What the benchmarks compare computes the same thing; their figures are not looked at."""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnres_rewrite import functional as F
from benchmarks import block, machine, peers, reads, timing

ROOT = Path(__file__).parents[1]
SMALL = {"sources": 3, "sublayers": 4, "queries": 4, "tokens": 6, "width": 16, "dtype": "float64", "device": "cpu"}


def small_block() -> block.Inputs:
    inputs = block.Inputs(argparse.Namespace(**SMALL))
    # drawn in float32, whatever the rows are
    for name in ("queries", "gains"):
        setattr(inputs, name, [value.detach().double().requires_grad_() for value in getattr(inputs, name)])
    return inputs


def assert_same(inputs: block.Inputs, outs: list[torch.Tensor], *, stacked: bool) -> None:
    wanted = block.ours(inputs)
    assert block.difference(outs, wanted) < 1e-12
    found, gradients = block.gradients(outs, inputs, stacked), block.gradients(wanted, inputs, stacked=False)
    assert block.difference(found, gradients) < 1e-12


def test_a_block_of_single_reads():
    inputs = small_block()
    assert_same(inputs, block.by_reads(inputs, block.read_by_hand), stacked=False)


def test_a_block_of_two_phases():
    inputs = small_block()

    def phase_1(stacked, queries, gains):
        return F.inter_block(list(stacked), queries, gains, block.EPS)

    def phase_2(partial, query, gain, out, lse):
        return F.merge(out, lse, partial, query, gain, block.EPS)

    assert_same(inputs, block.by_phases(inputs, phase_1, phase_2), stacked=True)


def test_a_block_of_one_sublayer():
    inputs = block.Inputs(argparse.Namespace(**SMALL | {"sublayers": 1, "dtype": "float32"}))
    assert block.difference(block.by_reads(inputs, block.read_by_hand), block.ours(inputs)) < 1e-6


def test_the_difference_is_relative():
    wanted = [torch.full((3,), 2.0), torch.zeros(0), torch.ones(4)]
    assert block.difference(wanted, wanted) == 0.0
    assert block.difference([2.0 * part for part in wanted], wanted) == pytest.approx(1.0)


def test_the_backward_that_is_timed_makes_gradients_and_nothing_else():
    """A stack of them, which the comparison needs, would be 2N rows more than other variants have."""
    inputs = small_block()
    found = block.backward(block.ours(inputs), inputs, stacked=False)
    assert [gradient.shape for gradient in found] == [leaf.shape for leaf in inputs.leaves(stacked=False)]


class Clock:
    """A GPU on which copies take 3 ms and everything else 1 ms, and torch.cuda.Event of it."""

    now = 0.0

    def __init__(self, *, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Clock.now

    def elapsed_time(self, end):
        return end.at - self.at


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch):
    """A call that only launches returns at once, and what keeps the GPU busy before it does not count."""
    calls = []

    def operation():
        calls.append(Clock.now)
        Clock.now += 3.0

    def written(*shape, device, **options):
        assert device == "cuda"
        buffer = torch.zeros(1)
        buffer.zero_ = lambda: setattr(Clock, "now", Clock.now + 1.0)
        return buffer

    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", written)
    assert timing.seconds_of(operation, 4, "cuda") == pytest.approx(3e-3)
    # three that do not count, then a busy GPU before each
    assert [later - earlier for earlier, later in itertools.pairwise(calls)] == [3.0, 3.0, 7.0, 7.0, 7.0, 7.0]


def test_a_run_that_is_cut_short_keeps_its_rows(tmp_path):
    def rows():
        yield {"operation": "copy"}
        raise KeyboardInterrupt

    options = argparse.Namespace(json=tmp_path / "rows.json", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        machine.write_as_they_come(options, rows())
    assert json.loads(options.json.read_text())["rows"] == [{"operation": "copy"}]


def test_a_peer_that_is_missing_says_so(monkeypatch, capsys):
    def missing() -> peers.Read:
        raise ImportError("No module named 'fla'")

    monkeypatch.setattr(peers, "READS", {"fla-core": missing})
    inputs = reads.Inputs(argparse.Namespace(**SMALL | {"dtype": "float32"}))
    make = reads.peer_reads(inputs)["fla-core"]
    rows = reads.peer_rows("fla-core", make, {}, inputs, argparse.Namespace(rounds=1, device="cpu"))
    assert [row["not_run"] for row in rows] == ["ImportError: No module named 'fla'"] * 2
    assert "not run" in capsys.readouterr().out


@pytest.mark.slow
def test_the_block_is_timed(tmp_path):
    sizes = ["--sources", "3", "--sublayers", "2", "--tokens", "8", "--width", "32", "--rounds", "1"]
    command = [sys.executable, str(ROOT / "benchmarks/block.py"), *sizes, "--json", str(tmp_path / "block.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    copy, ours, by_hand = json.loads((tmp_path / "block.json").read_text())["rows"]
    assert copy["gb_per_s"] > 0
    assert ours["forward"]["ratio_to_ours"] == 1.0
    assert by_hand["outputs_differ"] < 0.02
    assert by_hand["forward + backward"]["us"] > 0
