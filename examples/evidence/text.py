"""Text that every Python installation carries: the sources of its own standard library, as bytes.

In: the running Python. Out: a `Corpus`, two tensors of bytes and what names them: the version and a hash, as the text
differs between versions of Python. It is read where it is installed and never copied. The split is by file, on a
hash of the file's name, so that no file is in both halves and a new file moves no other.
"""

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# installed packages, tests (Debian leaves them out), and files that differ from machine to machine
LEFT_OUT = frozenset(["site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"])
MACHINE_FILE = "_sysconfigdata"
VALIDATION_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes to train on and bytes to validate on, uint8 [N] each, with the name of what they are."""

    train: Tensor
    validation: Tensor
    python: str
    sha256: str
    files: tuple[int, int]

    def facts(self) -> dict[str, object]:
        """Return what a result says about its text."""
        return {
            "text": f"standard library of Python {self.python}",
            "sha256": self.sha256,
            "train_files": self.files[0],
            "validation_files": self.files[1],
            "train_bytes": len(self.train),
            "validation_bytes": len(self.validation),
        }


def load_corpus(folder: Path | None = None) -> Corpus:
    """Read every .py file under `folder`, the standard library if None, in the order of their names.

    Raises:
        FileNotFoundError: One half of the split has no file.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    digest = hashlib.sha256()
    halves: dict[bool, list[bytes]] = {False: [], True: []}
    for name in _names(root):
        text = (root / name).read_bytes()
        digest.update(name.encode() + b"\0" + len(text).to_bytes(8, "little") + text)
        halves[is_validation(name)].append(text)
    if not halves[True] or not halves[False]:
        counts = f"{len(halves[False])} .py files to train on, {len(halves[True])} to validate on"
        raise FileNotFoundError(f"{root} has {counts}: this Python was installed without its sources")
    return Corpus(
        train=_bytes(halves[False]),
        validation=_bytes(halves[True]),
        python=platform.python_version(),
        sha256=digest.hexdigest(),
        files=(len(halves[False]), len(halves[True])),
    )


def is_validation(name: str) -> bool:
    """Say which half the file of this relative name belongs to."""
    first = hashlib.sha256(name.encode()).digest()[0]
    return first < 256 * VALIDATION_SHARE


def _names(root: Path) -> list[str]:
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (file for file in files if not LEFT_OUT & set(file.parts) and not file.name.startswith(MACHINE_FILE))
    return sorted(file.as_posix() for file in kept)


def _bytes(texts: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
