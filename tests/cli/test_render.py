"""What is printed, and where."""

import io
import json
import sys
import time
from dataclasses import replace

from attnres_rewrite.cli import render


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_report_in_a_pipe(report, capsys):
    render.report(report)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "Tiny",
        "  captured  torch.export(strict=False), eval mode, 42 nodes, 0.2 s",
        "  fixed     x[1] = 5: the program takes no other size",
        "  config    num_blocks=2, output=sum",
        "  added     32 parameters in 2 reads",
        "  passes    0.01 s",
        "",
        "stream  width 8, float32, 3 updates (3 residual)",
        "  2 blocks of updates: 1-2, 3; reads run as Triton kernels",
        "  state  sources  read by        add at      query                      schedule   in one pass with",
        "  1      2        layers.1[red]  tiny.py:12  layers.1.attn_res.0.query  two_phase  add, rms norm",
        "  3      3        (the model)    ?           attn_res.0.query           direct     -",
        "  finished sources  reads  direct, B/token  two-phase, B/token  schedule",
        "  1                 1      704              512                 two_phase",
        "  3                 1      640              992                 direct",
        "",
        "2 other adds left alone",
        "  2  it adds [bold] a bias",
    ]


def test_a_network_that_starts_as_another_one_is_told_of(report, capsys):
    render.report(replace(report, config=report.config | {"recency_bias": 2.0}))
    printed = " ".join(capsys.readouterr().out.split())
    assert "note the rewritten network does NOT start as the original: recency_bias=2.0" in printed


def test_all_adds_lists_each(report, capsys):
    render.report(report, all_adds=True)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[-3:] == [
        "  node   at         in           reason",
        "  add    tiny.py:3  (the model)  it adds [bold] a bias",
        "  add_1  tiny.py:4  layers.0     it adds [bold] a bias",
    ]


def test_proofs_show_every_figure(failing, capsys):
    render.proofs(failing)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "proof mode dtype output error gradient error limit compared",
        "original eval float64 1.0e-15 2.0e-15 1e-10 1 output, 7 gradients proven",
        "independent eval float64 nan 2.0e-15 1e-10 1 output, 7 gradients FAILED",
        "note: a note",
    ]


def test_places_are_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert render.place("/venv/lib/site-packages/transformers/qwen.py:7") == "transformers/qwen.py:7"
    assert render.place(f"{tmp_path}/nets/gpt.py:31") == "nets/gpt.py:31"
    assert render.place("/elsewhere/gpt.py:31") == "/elsewhere/gpt.py:31"
    assert render.place("") == "?"


def test_no_spinner_without_a_terminal(capsys):
    with render.working("load") as stage:
        stage("capture")
        print("the model talks")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "the model talks\n")


def test_the_spinner_names_the_stage_of_long_work(monkeypatch):
    monkeypatch.setattr(render, "SPINNER_AFTER_S", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with render.working("load") as stage:
        stage("capture [eval]")
        time.sleep(0.3)
    assert "capture [eval]" in terminal.getvalue()


def test_short_work_shows_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with render.working("load") as stage:
        stage("capture")
    assert terminal.getvalue() == ""


def test_a_bar_counts_on_a_terminal_only(monkeypatch, capsys):
    with render.counting("batches") as count:
        count(1, 2)
        print("the data talks")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "the data talks\n")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with render.counting("batches") as count:
        count(3, 7)
        count(4, None)
    assert "4/7" in terminal.getvalue()


def test_json_has_no_number_that_is_not_finite(capsys):
    inf = float("inf")
    render.facts({"errors": [inf, -inf, float("nan"), 0.5, None], "nested": ({"limit": inf},), "name": "NaN"})
    facts = {"errors": ["Infinity", "-Infinity", "NaN", 0.5, None], "nested": [{"limit": "Infinity"}], "name": "NaN"}
    assert json.loads(capsys.readouterr().out, parse_constant=lambda constant: 1 / 0) == facts
    assert [float(text) for text in facts["errors"][:2]] == [inf, -inf]
