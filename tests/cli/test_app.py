"""Commands, options and exit statuses, over a fake library; test_end_to_end runs the real one."""

import subprocess
import sys
from pathlib import Path

import pytest

import attnres_rewrite as ar
from attnres_rewrite.cli import app
from attnres_rewrite.errors import NoStreamError, explain


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


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_saved_rewrite_takes_no_plan(cli, library, artifact, command):
    done = cli(command, artifact, "--blocks", "2")
    assert done.code == 2
    assert "is a rewrite already" in done.err


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
        ("rewrite tiny.py --meta", "inspect, partition and report take it"),
        ("verify tiny.py --meta", "inspect, partition and report take it"),
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "missing.py", "--json"]])
def test_a_full_disk_is_said_in_a_line(arguments):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "attnres_rewrite", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "refused: the output cannot be written: No space left on device\n"


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
