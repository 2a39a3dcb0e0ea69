"""attnres-rewrite partition, with the real library."""

import json
import math
from pathlib import Path

import pytest

import attnres_rewrite as ar

GPT = Path(__file__).parents[2] / "examples" / "gpt.py"


def test_the_table(cli):
    done = cli("partition", GPT, "--ranks", 2, "--virtual", 2, "--blocks", 4)
    assert done.code == 0
    assert "2 ranks with 2 stages each, placed as a loop" in done.out
    lines = [line.split() for line in done.out.splitlines()]
    hops = {line[0]: line for line in lines if line and line[0] in ("naive", "paper", "exact")}
    assert " ".join(hops["naive"][1:6]) == "9 6 2 3 4"
    assert " ".join(hops["exact"][1:7]) == "(chosen) 4 3 2 1 1"


def test_facts_and_the_file_are_the_same(cli, tmp_path):
    target = tmp_path / "plan.json"
    done = cli("partition", GPT, "--ranks", 2, "--virtual", 2, "--blocks", 4, "--mode", "paper", "--json", "-o", target)
    assert done.code == 0
    facts = done.facts
    assert facts == json.loads(target.read_text())
    assert facts["mode"] == "paper"
    assert facts["traffic"]["exact"]["total_units"] == 4
    assert facts["traffic"]["naive"]["per_hop_units"] == [2, 3, 4]
    assert len(facts["stages"]) == 4


def test_stages_of_which_nothing_is_counted(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(ar.PipelinePlan, "balance", property(lambda plan: math.nan))
    target = tmp_path / "plan.json"
    done = cli("partition", GPT, "--ranks", 2, "--json", "-o", target)
    assert done.facts["balance"] == "NaN"
    assert json.loads(target.read_text()) == done.facts


def test_a_schedule_chooses_the_placement(cli):
    done = cli("partition", GPT, "--ranks", 2, "--virtual", 2, "--schedule", "ZBVZeroBubble", "--json")
    assert done.facts["placement"] == "v"


def test_named_cuts(cli):
    done = cli("partition", GPT, "--ranks", 3, "--cuts", "layers.2,layers.4", "--json")
    stages = done.facts["stages"]
    assert [stage["modules"][0] for stage in stages][1:] == ["layers.2", "layers.4"]


def test_a_gate_sends_the_running_sum_as_well(cli):
    done = cli("partition", GPT, "--ranks", 2, "--blocks", 4, "--cuts", "blocks", "--gate", "--json")
    plain = cli("partition", GPT, "--ranks", 2, "--blocks", 4, "--cuts", "blocks", "--json")
    units = [json.loads(one.out)["traffic"]["exact"]["total_units"] for one in (done, plain)]
    assert units[0] == units[1] + 1


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--ranks", 40), 1, "40 stages need 39 cuts"),
        (("--ranks", 2, "--cuts", "nothing"), 1, "no module is called nothing"),
        (("--ranks", 2, "--schedule", "DualPipeV"), 2, "DualPipeV runs 2 stage(s) on a rank, not 1"),
        (("--ranks", 0), 2, "at least 1"),
        (("--ranks", 2, "--heads", 3), 2, "num_heads=3 does not divide the"),
        (("--ranks", 2, "--mode", "best"), 2, "'naive', 'paper', 'exact'"),
        (("--ranks", 2, "--microbatches", 4), 2, "give --plot as well"),
        # both were once tracebacks, after the work
        (("--ranks", 2, "-o", "/", "--force"), 2, "-o / is a folder"),
        (("--ranks", 2, "-o", "/proc/plan.json"), 1, "plan.json cannot be written"),
    ],
)
def test_what_is_refused(cli, options, code, says):
    done = cli("partition", GPT, *options)
    assert done.code == code
    assert says in " ".join(done.err.split())


def test_a_file_that_is_there_stays(cli, tmp_path):
    target = tmp_path / "plan.json"
    target.write_text("mine")
    done = cli("partition", GPT, "--ranks", 2, "-o", target)
    assert done.code == 1
    assert target.read_text() == "mine"
    assert cli("partition", GPT, "--ranks", 2, "-o", target, "--force").code == 0
    assert json.loads(target.read_text())["num_ranks"] == 2


def test_a_picture(cli, tmp_path):
    path = tmp_path / "plan.svg"
    found = cli("partition", GPT, "--ranks", 2, "--plot", path)
    assert found.code == 0
    assert "partial sum of block" in path.read_text()


def test_a_picture_of_no_known_kind(cli, tmp_path):
    found = cli("partition", GPT, "--ranks", 2, "--plot", tmp_path / "plan.bmp")
    assert found.code == 2
    assert "must end in .svg, .png, .pdf" in found.err


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize(("one", "other"), [("plan.svg", "plan.svg"), ("plan.svg", "folder/../plan.svg")])
def test_a_plan_and_a_picture_of_one_name(cli, tmp_path, monkeypatch, one, other, force):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    # refused before the model is looked for
    found = cli("partition", "no_such_model.py", "--ranks", 2, "-o", one, "--plot", other, *force)
    assert found.code == 2
    assert f"-o {one} and --plot {other} are one file" in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_model_is_not_replaced(cli, tiny_file):
    before = tiny_file.read_text()
    found = cli("partition", tiny_file, "--ranks", 2, "-o", tiny_file, "--force")
    assert found.code == 2
    assert "would replace MODEL" in found.err
    assert tiny_file.read_text() == before
