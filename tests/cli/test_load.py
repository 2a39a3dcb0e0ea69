"""MODEL arguments: what each form gives, and what each refusal says."""

import sys
import textwrap
import zipfile

import pytest
import torch

from attnres_rewrite.cli import load
from attnres_rewrite.errors import ModelSpecError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a model file of this text, and give its path."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write_file(text: str, name: str = "net.py") -> str:
        path = tmp_path / name
        path.write_text("import torch\nfrom torch import nn\n" + textwrap.dedent(text))
        return str(path)

    return write_file


@pytest.mark.parametrize(
    ("text", "num_args", "kwargs"),
    [
        ("def build(): return nn.Linear(2, 3), (torch.ones(1, 2),)", 1, {}),
        ("def make_model(): return nn.Linear(2, 3), (), {'input': 1}", 0, {"input": 1}),
        ("def get_model(): return nn.Linear(2, 3), (1,), None", 1, {}),
        ("model = nn.Sequential(); model.forward = lambda: None", 0, {}),
        ("class model(nn.Module):\n    def forward(self, x=1): return x", 0, {}),
    ],
)
def test_default_factories(write, text, num_args, kwargs):
    found = load.load(write(text))
    assert isinstance(found.model, torch.nn.Module)
    assert len(found.args) == num_args
    assert found.kwargs == kwargs


def test_build_comes_before_model(write):
    assert load.load(write("def model(): 1 / 0\ndef build(): return nn.Linear(2, 2), (1,)")).args == (1,)


def test_a_named_factory_and_a_neighbour(write):
    write("WIDTH = 7", "neighbour.py")
    found = load.load(
        write("def wide():\n    import neighbour\n    return nn.Linear(neighbour.WIDTH, 1), ()") + ":wide"
    )
    assert found.model.in_features == 7


def test_a_module_from_a_package(write, tmp_path, monkeypatch):
    (tmp_path / "zoo_pack").mkdir()
    write("def vit(): return nn.Linear(2, 2), (5,)", "zoo_pack/nets.py")
    monkeypatch.chdir(tmp_path)
    assert load.load("zoo_pack.nets:vit").args == (5,)


@pytest.mark.parametrize(
    ("text", "factory", "first", "then"),
    [
        ("def other(): pass\nclass Net: pass", "", "has no factory called build or model", "other, Net"),
        ("x = 1", "", "has no factory called", "no function and no class"),
        ("def build(): pass", ":nope", "has no nope", "It defines build."),
        ("build = 3", "", "gives no model", "It is a int, not a function."),
        ("def build(width): pass", "", "net.py:3", "The factory wants width"),
        ("def build(): pass", "", "net.py:3", "It returned None where the module belongs."),
        ("def build(): return 'x', ()", "", "net.py:3", "It returned a builtins.str where the module"),
        (
            "def build(): return nn.Identity(), 1",
            "",
            "net.py:3",
            "It returned a builtins.int where the tuple",
        ),
        ("def build(): return nn.Identity(), (), ()", "", "net.py:3", "a builtins.tuple where the dict"),
        ("def build(): return 1, 2, 3, 4", "", "net.py:3", "It returned a tuple of 4."),
        ("def build(): return nn.Linear(2, 2)", "", "no inputs to trace Linear", "Its forward wants input."),
        ("def build():\n    raise OSError('no disk')", "", "raised, at", "net.py:4\n  OSError: no disk"),
        ("def build():\n    nn.Linear('a', 2)", "", "net.py:4", "TypeError: "),
        ("import no_such_package", "", "cannot be imported, at", "net.py:3\n  ModuleNotFoundError"),
        ("raise SystemExit(3)", "", "net.py:3", "SystemExit: 3"),
        ("def build(:", "", "net.py:3", "SyntaxError"),
    ],
)
def test_refusals_say_what_and_where(write, text, factory, first, then):
    with pytest.raises(ModelSpecError) as refusal:
        load.load(write(text) + factory)
    assert first in str(refusal.value)
    assert then in str(refusal.value)


def test_what_a_factory_raised_is_chained(write):
    with pytest.raises(ModelSpecError) as refusal:
        load.load(write("def build(): raise OSError('no disk')"))
    assert isinstance(refusal.value.__cause__, OSError)


def test_a_missing_module():
    with pytest.raises(ModelSpecError, match="module no_such_package cannot be imported"):
        load.load("no_such_package:build")


@pytest.mark.parametrize("spec", ["a b:c", "a.b", "x:", ":y", "a..b:c"])
def test_what_does_not_parse_is_a_wrong_argument(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not parse"):
        load.load(spec)


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors is a file of another kind\. MODEL is"):
        load.load(str(path))


def test_an_empty_folder(tmp_path):
    with pytest.raises(ModelSpecError, match="holds no model"):
        load.load(str(tmp_path))


def test_an_exported_program(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 3), (torch.ones(4, 2),))
    torch.export.save(program, path := tmp_path / "net.pt2")
    found = load.load(str(path))
    assert isinstance(found.model, torch.export.ExportedProgram)
    assert found.args[0].shape == (4, 2)


def test_a_damaged_exported_program(tmp_path):
    path = tmp_path / "net.pt2"
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ModelSpecError, match=r"net\.pt2 is no exported program\n  It is no archive"):
        load.load(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ModelSpecError, match=r"net\.pt2 is no exported program\n  torch\.export\.load: "):
        load.load(str(path))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("a/gpt.py", "gpt"),
        ("a/gpt.py:build", "gpt"),
        ("a/net.pt2", "net"),
        ("pack.sub.models:vit", "models"),
    ],
)
def test_names_of_saved_folders(spec, name):
    assert load.name_of(spec) == name


def test_a_folder_gives_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "Qwen3-0.6B").mkdir()
    monkeypatch.chdir(tmp_path / "Qwen3-0.6B")
    assert load.name_of(str(tmp_path / "Qwen3-0.6B")) == load.name_of(".") == "Qwen3-0.6B"
