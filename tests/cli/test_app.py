"""Commands, options and exit statuses, over a fake library; test_end_to_end runs the real one."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import attnres_rewrite as ar
from attnres_rewrite.cli import app
from attnres_rewrite.errors import NoStreamError, explain


@dataclass
class Fake:
    """Stands in for the library: returns what it was given, remembers what it was asked."""

    report: object
    figures: object
    asked: dict

    def inspect(self, model, args, kwargs, config, *, progress):
        self.asked.update(model=model, args=args, kwargs=kwargs, config=config)
        return self.report

    def rewrite(self, model, args, kwargs, config, *, verify=True, progress):
        self.asked.update(model=model, args=args, kwargs=kwargs, config=config, verify=verify)
        progress("a stage")
        return self

    def verify(self, new, *, progress):
        assert new is self
        return self.figures

    def save(self, new, folder, *, force):
        self.asked.update(folder=folder, force=force)
        return folder

    def load(self, folder):
        self.asked.update(loaded=folder)
        return self


@pytest.fixture
def library(monkeypatch, report, passing) -> Fake:
    fake = Fake(report, passing, {})
    for name in ("inspect", "rewrite", "verify", "save", "load"):
        monkeypatch.setattr(ar, name, getattr(fake, name))
    return fake


@pytest.fixture
def artifact(tmp_path) -> Path:
    folder = tmp_path / "tiny.attnres"
    folder.mkdir()
    (folder / "attnres.json").write_text("{}")
    return folder


def refusing(*_, **__):
    raise NoStreamError(explain("no residual stream in Tiny", "tiny.py:3", "why", "do this"))


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ((), {}),
        (("--blocks", "full"), {"num_blocks": "full"}),
        (("--blocks", "3", "--output", "mean"), {"num_blocks": 3, "output": "mean"}),
        (("--block-size", "6", "--no-key-norm"), {"block_size": 6, "key_norm": False}),
        (("--block-layers", "2", "--schedule", "direct"), {"block_layers": 2, "schedule": "direct"}),
        (("--heads", "4", "--gate"), {"num_heads": 4, "gate": True}),
        (("--key-rank", "3", "--recency-bias", "-1.5"), {"key_rank": 3, "recency_bias": -1.5}),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "rewrite", "verify"])
def test_options_reach_the_config(cli, library, tiny_file, tmp_path, monkeypatch, command, options, config):
    monkeypatch.chdir(tmp_path)
    assert cli(command, tiny_file, *options).code == 0
    assert library.asked["config"] == ar.AttnResConfig(**config)


def test_inspect_prints_the_report(cli, library, tiny_file):
    done = cli("inspect", f"{tiny_file}:build")
    assert done.code == 0
    assert "layers.1.attn_res.0.query" in done.out
    assert len(library.asked["args"]) == 1


def test_only_facts_on_stdout(cli, library, tiny_file):
    done = cli("inspect", tiny_file, "--json")
    assert done.facts == json.loads(json.dumps(library.report.to_dict()))
    assert done.facts["streams"][0]["reads"][0]["query_name"] == "layers.1.attn_res.0.query"
    assert "the model talks" in done.err


def test_rewrite_says_where_it_saved(cli, library, tiny_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("rewrite", tiny_file)
    assert done.code == 0
    assert "saved  tiny.attnres" in done.out
    assert "1.0e-15" in done.out
    assert library.asked["folder"] == Path("tiny.attnres")
    assert (library.asked["verify"], library.asked["force"]) == (True, False)


def test_rewrite_json_has_the_path(cli, library, tiny_file, tmp_path):
    done = cli("rewrite", tiny_file, "-o", tmp_path / "here", "--json")
    assert done.facts["saved"] == str(tmp_path / "here")
    assert done.facts["verify"]["passed"] is True


def test_no_verify_is_loud(cli, library, tiny_file, tmp_path):
    library.report = replace(library.report, verify=None)
    done = cli("rewrite", tiny_file, "-o", tmp_path / "here", "--no-verify")
    assert done.code == 0
    assert library.asked["verify"] is False
    assert "NOTHING WAS PROVEN" in done.err


def test_an_existing_folder_is_refused_before_the_work(cli, library, tiny_file, tmp_path):
    done = cli("rewrite", tiny_file, "-o", tmp_path)
    assert done.code == 1
    assert done.err.startswith(f"refused: {tmp_path} exists\n  --force replaces it")
    assert library.asked == {}
    assert cli("rewrite", tiny_file, "-o", tmp_path, "--force").code == 0
    assert library.asked["force"] is True


def test_verify_rewrites_in_memory(cli, library, tiny_file):
    done = cli("verify", tiny_file)
    assert done.code == 0
    assert library.asked["verify"] is True
    assert "folder" not in library.asked
    assert "proven" in done.out


def test_verify_a_saved_rewrite(cli, library, artifact):
    done = cli("verify", artifact, "--json")
    assert done.code == 0
    assert library.asked == {"loaded": artifact}
    assert done.facts["passed"] is True


def test_inspect_a_saved_rewrite_shows_its_report(cli, library, artifact):
    assert "layers.1.attn_res.0.query" in cli("inspect", artifact).out


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_saved_rewrite_takes_no_plan(cli, library, artifact, command):
    done = cli(command, artifact, "--blocks", "2")
    assert done.code == 2
    assert "is a rewrite already" in done.err


def test_a_failed_proof_shows_its_figures_and_exits_1(cli, library, artifact, failing):
    library.figures = failing
    done = cli("verify", artifact)
    assert done.code == 1
    assert "FAILED" in done.out
    assert "failed: independent (eval)" in done.err
    done = cli("verify", artifact, "--json")
    assert done.code == 1
    assert done.facts["error"]["class"] == "ProofError"
    assert done.facts["passed"] is False
    # JSON has no NaN, and null is a gradient that was not taken
    assert [proof["output_error"] for proof in done.facts["proofs"]] == [1e-15, "NaN"]


def test_a_rewrite_is_not_rewritten(cli, library, artifact):
    done = cli("rewrite", artifact, "-o", "twice", "--json")
    assert done.code == 1
    assert done.facts["error"]["class"] == "AlreadyRewrittenError"
    assert library.asked == {}


@pytest.mark.parametrize("command", ["inspect", "rewrite", "verify"])
def test_a_refusal_exits_1(cli, library, tiny_file, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ar, "inspect", refusing)
    monkeypatch.setattr(ar, "rewrite", refusing)
    done = cli(command, tiny_file)
    assert (done.code, done.out) == (1, "")
    assert done.err.endswith("refused: no residual stream in Tiny, at tiny.py:3\n  why\n  do this\n")
    done = cli(command, tiny_file, "--json")
    assert done.code == 1
    assert done.facts["error"] == {
        "class": "NoStreamError",
        "message": "no residual stream in Tiny, at tiny.py:3\n  why\n  do this",
    }
    assert list(tmp_path.glob("*.attnres")) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("inspect tiny.py --blocks 0", "num_blocks=0 must be at least 1"),
        ("inspect tiny.py --blocks -3", "num_blocks=-3 must be at least 1"),
        ("inspect tiny.py --blocks many", "--blocks many must be a count or full"),
        ("inspect tiny.py --blocks 2 --block-size 3", "give one of them"),
        ("inspect tiny.py --output max", "output='max' must be one of 'sum', 'mean'"),
        ("inspect tiny.py --seq 8", "--batch and --seq size the inputs"),
        ("inspect tiny.py --meta", "--meta builds a Hugging Face folder"),
        ("inspect tiny.py --block-size six", "--block-size"),
        ("inspect tiny.py --batch 0", "--batch"),
        ("inspect missing.py", "there is no file missing.py"),
        ("inspect missing.pt2", "there is no file missing.pt2"),
        ("inspect missing", "MODEL is FILE.py[:factory]"),
        ("inspect tiny.py:not-a-name", "names no factory"),
        ("inspect --frob tiny.py", "--frob"),
        ("inspect", "MODEL"),
        ("frob tiny.py", "frob"),
        ("rewrite tiny.py --meta", "only inspect takes it"),
        ("verify tiny.py --meta", "only inspect takes it"),
        ("rewrite tiny.py -o nowhere/new", "there is no folder nowhere"),
    ],
)
def test_wrong_arguments_exit_2(cli, library, tiny_file, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    done = cli(*arguments.split())
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    done = cli(*arguments.split(), "--json")
    assert done.code == 2
    assert says in done.facts["error"]["message"]
    assert library.asked == {}


def test_an_unexpected_error_is_not_a_refusal(cli, library, tiny_file, monkeypatch, capsys):
    def broken(*_, **__):
        raise KeyError("a bug")

    monkeypatch.setattr(ar, "inspect", broken)
    with pytest.raises(KeyError, match="a bug"):
        cli("inspect", tiny_file)
    with pytest.raises(KeyError, match="a bug"):
        cli("inspect", tiny_file, "--json")
    assert '"class": "KeyError"' in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "rewrite", "verify"])
def test_help_has_examples_and_warns(cli, command):
    done = cli(command, "--help")
    text = " ".join(done.out.split())
    assert done.code == 0
    assert f"attnres-rewrite {command} " in text
    assert "runs its code" in text
    assert "Exit status" in text


def test_version(cli):
    done = cli("--version")
    assert done.code == 0
    assert done.out.startswith("attnres-rewrite ")


def test_the_module_runs_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "attnres_rewrite", "inspect", "missing.py"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "there is no file missing.py" in done.stderr


def test_help_needs_no_torch():
    """The command line itself is light: what the package imports is the package's own affair."""
    package = Path(app.__file__).parents[1]
    code = (
        "import sys, types\n"
        "package = sys.modules['attnres_rewrite'] = types.ModuleType('attnres_rewrite')\n"
        f"package.__path__ = [{str(package)!r}]\n"
        "from attnres_rewrite.cli import app\n"
        "assert app.run(['rewrite', '--help']) == 0\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
