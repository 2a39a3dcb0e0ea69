"""A folder is written whole, or nothing changes."""

import os

import pytest

from attnres_rewrite.whole_folder import whole_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "it"
    with whole_folder(target) as draft:
        (draft / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert names(tmp_path / "new") == ["it"]


def test_an_earlier_folder_is_replaced_with_all_its_files(tmp_path):
    for name in ("old", "new"):
        with whole_folder(tmp_path / "it") as draft:
            (draft / name).write_text(name)
    assert names(tmp_path / "it") == ["new"]
    assert names(tmp_path) == ["it"]


def test_an_error_leaves_what_was_there(tmp_path):
    with whole_folder(tmp_path / "it") as draft:
        (draft / "old").write_text("kept")
    with pytest.raises(UnicodeEncodeError), whole_folder(tmp_path / "it") as draft:
        (draft / "new").write_text("half \udc00")
    assert names(tmp_path / "it") == ["old"]
    assert names(tmp_path) == ["it"]


def test_a_folder_that_cannot_be_moved_leaves_what_was_there(tmp_path, monkeypatch):
    with whole_folder(tmp_path / "it") as draft:
        (draft / "old").write_text("kept")
    rename = type(tmp_path).rename

    def fails_for_the_draft(path, target):
        if (path / "new").exists():
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", fails_for_the_draft)
    with pytest.raises(OSError, match="no"), whole_folder(tmp_path / "it") as draft:
        (draft / "new").write_text("whole")
    assert names(tmp_path / "it") == ["old"]
    assert names(tmp_path) == ["it"]


def test_others_may_read_it_as_the_mask_says(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "it") as draft:
            (draft / "a").write_text("1")
    finally:
        os.umask(before)
    assert oct((tmp_path / "it").stat().st_mode)[-3:] == "750"
    assert oct((tmp_path / "it" / "a").stat().st_mode)[-3:] == "640"
