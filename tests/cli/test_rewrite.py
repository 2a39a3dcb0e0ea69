"""The command rewrite, over a fake library."""

from dataclasses import replace
from pathlib import Path


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


def test_a_rewrite_is_not_rewritten(cli, library, artifact):
    done = cli("rewrite", artifact, "-o", "twice", "--json")
    assert done.code == 1
    assert done.facts["error"]["class"] == "AlreadyRewrittenError"
    assert library.asked == {}
