"""Mirrors attnres_rewrite/cli/targets.py: which paths are one file."""

from pathlib import Path

import pytest

from attnres_rewrite.cli.targets import model_file, refuse_same_file


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("here.json")
    (tmp_path / "hard.json").hardlink_to(tmp_path / "here.json")
    return tmp_path


@pytest.mark.parametrize("other", ["here.json", "./here.json", "link.json", "hard.json"])
def test_one_file_of_two_names(folder, other):
    for name in (other, str(folder / other)):
        with pytest.raises(ValueError, match="-o here.json and --plot .* are one file"):
            refuse_same_file({"-o": Path("here.json"), "--plot": Path(name)}, {})
        with pytest.raises(ValueError, match="-o here.json would replace MODEL, which is read"):
            refuse_same_file({"-o": Path("here.json")}, {"MODEL": Path(name)})


def test_files_of_their_own():
    refuse_same_file({"-o": Path("here.json"), "--plot": Path("plan.svg")}, {"MODEL": Path("plan.json")})
    refuse_same_file({"-o": Path("here.json"), "--plot": None}, {"MODEL": None})


def test_the_file_of_a_model():
    assert model_file("here.json:build") == model_file("here.json") == Path("here.json")
    assert model_file("package.module:build") is None
