"""What a command would write -> a refusal where that would replace something else."""

import tempfile
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

from attnres_rewrite.cli import load
from attnres_rewrite.errors import ArtifactError, explain


def refuse_existing(target: Path, force: bool) -> None:
    """Refuse before the work, not after it, what the save would refuse.

    Raises:
        ArtifactError: The folder to save in exists, and there is no `force`.
        ValueError: There is no folder to make it in.
    """
    if not target.parent.is_dir():
        raise ValueError(f"-o {target}: there is no folder {target.parent}")
    if target.exists() and not force:
        raise ArtifactError(explain(f"{target} exists", remedy="--force replaces it, -o names another folder."))


def refuse_unwritable_file(option: str, path: Path, force: bool) -> None:
    """Refuse before the work a file that could not be written, or is not to be.

    Raises:
        ArtifactError: There is a file already and no `force`, or the folder takes no new file.
        ValueError: There is no such folder, or the path is that of a folder.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file in it")
    if path.exists() and not force:
        raise ArtifactError(explain(f"{path} exists", remedy=f"--force replaces it, {option} names another file."))
    _refuse_unwritable(path.parent, f"{path} cannot be written", f"{option} names another file.")


def refuse_unwritable_folder(target: Path, force: bool) -> None:
    """Refuse before the work a folder, new or not, that takes no files, or is not to be changed.

    Raises:
        ArtifactError: It exists and there is no `force`, it is no folder, or it takes no file.
        ValueError: There is no folder to make it in.
    """
    refuse_existing(target, force)
    if target.exists() and not target.is_dir():
        raise ArtifactError(explain(f"{target} is no folder", remedy="-o names a folder."))
    folder = target if target.exists() else target.parent
    _refuse_unwritable(folder, f"{folder} cannot be written", "-o names another folder.")


def _refuse_unwritable(folder: Path, what: str, remedy: str) -> None:
    try:
        # permissions do not tell: a root user passes them all, and a read-only file system has its own mind
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as why:
        raise ArtifactError(explain(what, None, why.strerror or str(why), remedy)) from why


def refuse_same_file(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Refuse before the work two outputs of one path, and an output that is an input.

    Args:
        outputs: What will be written, by the option that names it; None where it is not asked for.
        inputs: What is read, in the same form.

    Raises:
        ValueError: Two are one file, whatever they are called.
    """
    wanted = [(option, path) for option, path in outputs.items() if path is not None]
    for (option, path), (other, other_path) in combinations(wanted, 2):
        if _are_one(path, other_path):
            raise ValueError(f"{option} {path} and {other} {other_path} are one file: give one of them another name")
    for option, path in wanted:
        for source, read in inputs.items():
            if read is not None and _are_one(path, read):
                raise ValueError(f"{option} {path} would replace {source}, which is read: give it another name")


def model_file(model: str) -> Path | None:
    """Return the file or folder that a MODEL argument names; None for a module."""
    path = Path(load._split(model)[0])
    return path if path.exists() else None


def _are_one(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()
