"""A command line that returns what it did, and hand-made reports to print."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import attnres_rewrite as ar
from attnres_rewrite.cli import app
from attnres_rewrite.records import FixedDim, LeftAlone, ReadGroup
from attnres_rewrite.report import (
    CaptureReport,
    Proof,
    ReadReport,
    RewriteReport,
    StreamReport,
    VerifyReport,
)

TINY_FILE = """
from torch import nn
import torch

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x))
        return self.norms[-1](x)

def build():
    print("the model talks on stdout")
    return Tiny(), (torch.randn(2, 5, 8),)
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict:
        return json.loads(self.out, parse_constant=_no_json)


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


@pytest.fixture
def cli(capsys):
    """Run one command line, written as on a terminal."""

    def run(*arguments: str | Path) -> Outcome:
        code = app.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def tiny_file(tmp_path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TINY_FILE)
    return path


@pytest.fixture
def passing() -> VerifyReport:
    return VerifyReport((Proof("original", "eval", "float64", 1e-15, 2e-15, 1, 7, 1e-10),), ("a note",))


@pytest.fixture
def failing(passing) -> VerifyReport:
    bad = replace(passing.proofs[0], name="independent", output_error=float("nan"))
    return replace(passing, proofs=(*passing.proofs, bad))


@pytest.fixture
def report(passing) -> RewriteReport:
    reads = (
        ReadReport(
            1, "layers.1[red]", "tiny.py:12", 2, "layers.1.attn_res.0.query", "two_phase", ("add", "rms norm"), ""
        ),
        ReadReport(3, "", "", 3, "attn_res.0.query", "direct", (), "it is a direct read"),
    )
    groups = (
        ReadGroup(("layers.1.attn_res.0",), 1, 1, "two_phase", 704, 512),
        ReadGroup(("attn_res.0",), 3, 0, "direct", 640, 992),
    )
    return RewriteReport(
        model="Tiny",
        config={"num_blocks": 2, "output": "sum", "param_dtype": None},
        capture=CaptureReport("torch.export(strict=False)", ("eval",), 42, (FixedDim("x", 1, 5),), 0.25),
        streams=(
            StreamReport("stream", 8, "float32", 3, {"residual": 3}, ((1, 2), (3, 3)), reads, groups, "Triton kernels"),
        ),
        left_alone=(
            LeftAlone("add", "tiny.py:3", "", "it adds [bold] a bias"),
            LeftAlone("add_1", "tiny.py:4", "layers.0", "it adds [bold] a bias"),
        ),
        num_parameters_added=32,
        pass_seconds=0.01,
        verify=passing,
    )


@dataclass
class Fake:
    """Stands in for the library: returns what it was given, remembers what it was asked."""

    report: object
    figures: object
    asked: dict

    def inspect(self, model, args, kwargs, config, *, progress):
        self.asked.update(model=model, args=args, kwargs=kwargs, config=config)
        return self.report

    def rewrite(self, model, args, kwargs, config, dynamic_shapes, *, verify, progress):
        self.asked.update(model=model, args=args, kwargs=kwargs, config=config, verify=verify)
        progress("a stage")
        return self

    def verify(self, new, *, progress):
        assert new is self
        return self.figures

    def save(self, new, folder, *, force):
        self.asked.update(folder=folder, force=force)
        return folder

    def load(self, folder, device=None):
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
