"""attnres-rewrite diagnose, with the real library on a small model that was saved."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import attnres_rewrite as ar
from attnres_rewrite import plots
from tests.networks import gpt, ids

DATA = """
import torch

def batches():
    print("the data talks on stdout")
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 31, (2, 5), generator=generator) for _ in range(3)]

def with_a_loss():
    return iter(batches()), lambda outputs, batch: outputs.square().mean()

def nan():
    return batches(), lambda outputs, batch: outputs.sum() * float("nan")

def partly():
    cut = [batches()[0], batches()[1][:, :4], batches()[2]]
    return cut, lambda outputs, batch: outputs.square().mean() * (float("nan") if batch.shape[1] == 4 else 1.0)

def raises():
    return batches(), lambda outputs, batch: outputs.nothing

def empty():
    return []

def one():
    return batches()[0]

def foreign():
    return [batches()[0] + 31]

def floats():
    return [torch.randn(2, 5)]

def wants(path):
    return []

def long():
    return [{"ids": batches()[0], "attention_mask": torch.ones(2, 5)}]

def broken():
    yield batches()[0]
    raise OSError("the disk is gone")

listed = batches()
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    new = ar.rewrite(gpt(2), (ids(),), config=ar.AttnResConfig(num_blocks=2), verify=False)
    return ar.save(new, tmp_path_factory.mktemp("saved") / "gpt.attnres")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "other.py").write_text("def mine(): return []")
    return tmp_path


def test_tables_json_and_plots(cli, saved, folder):
    done = cli("diagnose", saved, "--data", "data.py", "-o", "out")
    assert done.code == 0, done.err
    assert "Gpt  eval mode, 3 batches, 30 tokens; loss " in done.out
    assert "(all alike)" in done.out
    assert "layers.1.attn" in done.out
    assert "the data talks" in done.err
    names = sorted(path.name for path in (folder / "out").iterdir())
    drawn = ("depth_attention", "entropies", "gradient_norms", "magnitudes")
    assert names == sorted(["diagnosis.json", *(f"{plot}.{kind}" for plot in drawn for kind in ("png", "svg"))])
    assert ar.Diagnosis.load(folder / "out" / "diagnosis.json").num_batches == 3


def test_facts_alone_on_stdout(cli, saved, folder):
    done = cli("diagnose", saved, "--data", "data.py:listed", "--batches", 2, "--no-plots", "--json")
    assert done.code == 0, done.err
    written = done.facts["written"]
    assert written == ["gpt.attnres.diagnosis/diagnosis.json"]
    stored = json.loads((folder / written[0]).read_text())
    assert done.facts == stored | {"written": written}
    assert stored["num_batches"] == 2


def test_what_is_there_stays(cli, saved, folder):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("mine")
    done = cli("diagnose", saved, "-o", "out", "--no-plots")
    assert done.code == 1
    assert done.err.startswith("refused: out exists\n  --force replaces it")
    assert cli("diagnose", saved, "-o", "out", "--no-plots", "--force").code == 0
    assert {path.name for path in (folder / "out").iterdir()} == {"thesis.txt", "diagnosis.json"}


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_plots_of_another_diagnosis_go_and_other_files_stay(cli, saved, folder):
    assert cli("diagnose", saved, "-o", "out").code == 0
    others = {"depth_attention.pdf", "thesis.png", "encoder.magnitudes.png"}
    for name in others:
        (folder / "out" / name).write_text("mine")
    done = cli("diagnose", saved, "-o", "out", "--no-plots", "--force")
    assert done.code == 0, done.err
    assert "removed 8 plots of the diagnosis that was in out" in done.err
    assert _names(folder / "out") == others | {"diagnosis.json"}


def test_plots_of_streams_that_are_no_more_go(cli, saved, folder):
    assert cli("diagnose", saved, "-o", "out", "--no-plots").code == 0
    found = ar.Diagnosis.load(folder / "out" / "diagnosis.json")
    (stream,) = found.streams
    two = replace(found, streams=(replace(stream, name="encoder"), replace(stream, name="decoder")))
    two.save(folder / "out" / "diagnosis.json", force=True)
    plots.save_plots(two, folder / "out")
    # no batch is finite: nothing is drawn, and nothing old is left
    assert cli("diagnose", saved, "--data", "data.py:nan", "-o", "out", "--force").code == 1
    assert _names(folder / "out") == {"diagnosis.json"}


def test_names_of_plots_without_a_diagnosis_are_others(cli, saved, folder):
    (folder / "out").mkdir()
    (folder / "out" / "magnitudes.png").write_text("mine")
    assert cli("diagnose", saved, "-o", "out", "--no-plots", "--force").code == 0
    assert _names(folder / "out") == {"diagnosis.json", "magnitudes.png"}


@pytest.mark.parametrize("target", ["none/out", "data.py", "/proc/out"])
def test_a_target_that_cannot_be_written_is_refused_before_the_work(cli, target):
    # the model is never looked for
    done = cli("diagnose", "nothing.attnres", "-o", target, "--force", "--no-plots")
    assert done.code == (2 if target == "none/out" else 1)
    assert target.removesuffix("/out") in done.err
    assert "nothing.attnres" not in done.err


def test_a_missing_matplotlib_is_refused_before_the_work(cli, saved, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = cli("diagnose", "nothing.attnres", "-o", "out")
    assert done.code == 1
    assert 'pip install "attnres-rewrite[plot]"' in done.err
    assert not (folder / "out").exists()
    assert cli("diagnose", saved, "-o", "out", "--no-plots").code == 0


def test_without_data_it_says_so(cli, saved):
    done = cli("diagnose", saved, "--no-plots")
    assert "there is no --data" in done.err
    assert "1 batch, 10 tokens" in done.out


def test_a_model_that_is_no_rewrite_is_rewritten_and_says_so(cli, folder):
    (folder / "net.py").write_text("from tests.networks import gpt, ids\n\ndef build():\n    return gpt(1), (ids(),)\n")
    done = cli("diagnose", "net.py", "--blocks", 1, "--no-plots")
    assert done.code == 0, done.err
    assert "net.py is no rewrite: it was rewritten here, unproven" in done.err


def test_a_twin_stands_beside_it(cli, saved, folder):
    twin = gpt(2)
    with torch.no_grad():
        twin.head.weight.mul_(2)
    safetensors.torch.save_file({name: value.clone() for name, value in twin.state_dict().items()}, "twin.safetensors")
    torch.save(twin.state_dict(), "twin.pt")
    found = []
    for name in ("twin.safetensors", "twin.pt"):
        done = cli(
            "diagnose", saved, "--data", "data.py", "--baseline", name, "--no-plots", "--json", "-o", f"{name}.out"
        )
        assert done.code == 0, done.err
        assert done.facts["baseline"] == "given"
        found.append(done.facts["baseline_loss"])
    assert found[0] == found[1] != done.facts["loss"]
    torch.save(gpt(1).state_dict(), "other.pt")
    done = cli("diagnose", saved, "--baseline", "other.pt", "--no-plots")
    assert done.code == 1
    assert "missing: layers.1.norm_1.weight" in done.err
    (folder / "bad.pt").write_text("x")
    torch.save([1, 2], "list.pt")
    done = cli("diagnose", saved, "--baseline", "list.pt", "--no-plots")
    assert done.err.startswith("refused: --baseline list.pt is no state dict\n  It holds a list.")
    done = cli("diagnose", saved, "--baseline", "none.pt", "--no-plots")
    assert done.err.endswith("--baseline none.pt: there is no file none.pt\n")
    assert "--baseline bad.pt cannot be read" in cli("diagnose", saved, "--baseline", "bad.pt", "--no-plots").err


def test_a_twin_that_talks_leaves_stdout_alone(cli, saved, folder):
    net = "from tests.networks import gpt, ids\n\ndef build():\n    print('hello')\n    return gpt(2), (ids(),)\n"
    (folder / "net.py").write_text(net)
    done = cli("diagnose", saved, "--data", "data.py", "--baseline", "net.py", "--no-plots", "--json")
    assert done.facts["baseline"] == "given"
    assert "hello" in done.err


def test_few_and_nonfinite_batches_are_said(cli, saved, folder):
    done = cli("diagnose", saved, "--data", "data.py:partly", "--batches", 9, "--no-plots")
    assert done.code == 0, done.err
    assert "the data has 3 batches, fewer than --batches 9" in done.err
    assert "1 of 3 batches were not finite and are in no figure: batch 1" in done.err
    assert "3 batches, 20 tokens" in done.out


def test_nothing_finite_is_written_and_refused(cli, saved, folder):
    done = cli("diagnose", saved, "--data", "data.py:nan", "-o", "out")
    assert done.code == 1
    assert "3 of 3 batches were not finite" in done.err
    assert "there is nothing to show: no batch was finite" in done.err
    assert ar.Diagnosis.load(folder / "out" / "diagnosis.json").nonfinite_batches == (0, 1, 2)


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        ("data.py:with_a_loss", 0, ""),
        ("data.py:raises", 1, "the loss_fn of data.py:raises raised, at "),
        ("data.py:empty", 2, "there is no batch to look at"),
        ("data.py:one", 1, "gives no batches"),
        ("data.py:nothing", 1, "data.py has no nothing"),
        ("data.py:broken", 1, "OSError: the disk is gone"),
        ("none.py", 2, "there is no file none.py"),
        (
            "data.py:foreign",
            1,
            "has a batch that cannot be run\n  IndexError: index out of range in self\n  in batch 0, int64",
        ),
        ("data.py:floats", 1, "in batch 0, float32 [2, 5]; the network was captured on int64 [2, 5]"),
        ("data.py:long", 2, "takes ids; got 0 positional and ['ids', 'attention_mask']. Leave out what"),
        (
            "data.py:wants",
            1,
            "data.py:wants gives no batches\n  The factory wants path, and is called without arguments.",
        ),
        ("other.py", 1, "It defines mine.\n  Name one of them, as in other.py:mine."),
    ],
)
def test_data(cli, saved, data, code, says):
    done = cli("diagnose", saved, "--data", data, "--no-plots")
    assert done.code == code, done.err
    assert says in done.err
