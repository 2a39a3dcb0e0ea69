"""Write a folder whole or not at all: under another name beside it, renamed when it is complete."""

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(target: Path) -> Generator[Path]:
    """Yield an empty folder that becomes `target` when the block ends, in place of a folder that is there.

    An error in the block leaves everything as it was.

    Raises:
        OSError: The folder, or those it is in, cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield draft
        _share(draft)
        _move_into_place(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _share(draft: Path) -> None:
    """Give the folder and its files the usual permissions: a temporary folder is its owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    draft.chmod(0o777 & ~mask)
    for path in draft.iterdir():
        path.chmod(0o666 & ~mask)


def _move_into_place(draft: Path, target: Path) -> None:
    """Rename the finished draft to its name; an earlier save is moved aside first and then removed."""
    if not target.exists():
        draft.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / "old"
    target.rename(aside)
    try:
        draft.rename(target)
    except OSError:
        aside.rename(target)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)
