"""Rewrite every real architecture of tests/zoo, prove each rewrite, and write docs/coverage.md.

    python benchmarks/zoo.py [--jobs 2] [--limit N] [--only PATTERN] [--timeout 120]
                             [--out docs/coverage.md] [--json benchmarks/results/zoo.json]

Each model runs in a process of its own, forked from a parent that has imported everything: a crash, a
hang or a model that wants too much memory is a row of the table, never the end of the run.
"""

import argparse
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.zoo.torchvision_cure import define_missing_ops  # noqa: E402

define_missing_ops()

import torch  # noqa: E402
import transformers  # noqa: E402

import attnres_rewrite as ar  # noqa: E402
from benchmarks.zoo_table import LIBRARIES, coverage_page  # noqa: E402
from tests.zoo import builders  # noqa: E402

CONFIG = ar.AttnResConfig(block_size=2)
MEMORY_BYTES = 16 << 30
POLL_SECONDS = 0.05


@dataclass(slots=True)
class Row:
    """What happened to one model. `outcome` is one of zoo_table.OUTCOMES."""

    name: str
    family: str
    expected: list[int] | str | None = None
    outcome: str = "not built"
    during: str = "build"  # the last stage that was entered
    route: str = ""
    updates: list[int] = field(default_factory=list)
    reads: int = 0
    original: list[float | None] = field(default_factory=list)  # output and gradient error, worst mode
    independent: list[float | None] = field(default_factory=list)
    refusal: str = ""  # class of the exception
    reason: str = ""
    seconds: float = 0.0


def measure(spec: builders.Spec, tell: Callable[[Row], None]) -> None:
    """Build, run, rewrite and prove one model; `tell` hears of each stage as it is entered."""
    expected = list(spec.expected) if isinstance(spec.expected, tuple) else spec.expected
    row = Row(spec.name, spec.family, expected)
    start = time.perf_counter()

    def enter(stage: str) -> None:
        row.during, row.seconds = stage, time.perf_counter() - start
        tell(row)

    enter("build")
    try:
        model = spec.build()
        row.outcome = "not run"
        enter("run eagerly")
        inputs = spec.inputs()
        with torch.no_grad():
            model(**inputs)
        row.outcome = "failed"
        enter("capture")
        _fill(row, ar.rewrite(model, (), inputs, config=CONFIG, progress=enter).report)
        row.outcome = "proven"
    except Exception as error:
        row.refusal, row.reason = type(error).__name__, _reason(error)
        row.outcome = _outcome_of(error, row.outcome)
    enter("done" if row.outcome == "proven" else row.during)


def _fill(row: Row, report: ar.RewriteReport) -> None:
    row.route = report.capture.route
    row.updates = [stream.num_updates for stream in report.streams]
    row.reads = len(report.reads)
    proofs = report.verify.proofs if report.verify else ()
    for name in ("original", "independent"):
        mine = [proof for proof in proofs if proof.name == name]
        gradients = [proof.gradient_error for proof in mine if proof.gradient_error is not None]
        worst = max((proof.output_error for proof in mine), default=None)
        setattr(row, name, [worst, max(gradients, default=None)])


def _outcome_of(error: Exception, reached: str) -> str:
    if reached != "failed":
        return reached
    if isinstance(error, ar.CaptureError):
        return "not captured"
    if isinstance(error, ar.ProofError):
        return "unproven"
    return "refused" if isinstance(error, ar.RewriteError) else "failed"


def _reason(error: Exception) -> str:
    """Return the first lines of the message, and for a bug the place; nothing that names this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:3])
    if not isinstance(error, ar.RewriteError) and error.__traceback__ is not None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{text} (at {Path(last.filename).name}:{last.lineno})"
    return re.sub(r"(?:/[\w.+-]+)+/", "", text)[:400]


@dataclass(slots=True)
class Child:
    """A model that is running: its process, the pipe it reports through, and what it has said."""

    spec: builders.Spec
    pid: int
    pipe: int
    deadline: float
    heard: bytes = b""

    def listen(self) -> bool:
        """Read what has come in; return whether the child is still there."""
        try:
            while piece := os.read(self.pipe, 65536):
                self.heard += piece
        except BlockingIOError:
            return True
        return False

    def row(self, ending: str) -> Row:
        """Return the last row told; `ending` is how a child ended that never said it was done."""
        told = [line for line in self.heard.split(b"\n") if line]
        # a killed child may leave half a line
        complete = told if self.heard.endswith(b"\n") else told[:-1]
        row = Row(**json.loads(complete[-1])) if complete else Row(self.spec.name, self.spec.family)
        if ending:
            row.outcome = "timeout" if ending == "timeout" else "crashed"
            row.reason = f"{ending} during: {row.during}"
        return row


def start(spec: builders.Spec, timeout: float) -> Child:
    """Fork a process that measures one model."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _become_quiet()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        try:
            measure(spec, lambda row: _tell(write, row))
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    os.close(write)
    os.set_blocking(read, False)
    return Child(spec, pid, read, time.monotonic() + timeout)


def _tell(pipe: int, row: Row) -> None:
    os.write(pipe, json.dumps(asdict(row)).encode() + b"\n")


def _become_quiet() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def finish(child: Child) -> Row | None:
    """Return the row of a child that has ended or run out of time; None while it may go on."""
    alive = child.listen()
    late = time.monotonic() > child.deadline
    if alive and not late:
        return None
    if alive:
        os.kill(child.pid, signal.SIGKILL)
    _, status = os.waitpid(child.pid, 0)
    os.close(child.pipe)
    if alive:
        return child.row("timeout")
    code = os.waitstatus_to_exitcode(status)
    return child.row("" if code == 0 else f"exit code {code}")


def run_all(specs: Sequence[builders.Spec], jobs: int, timeout: float) -> Iterator[Row]:
    """Measure every model, `jobs` at a time; yield each row as its model ends."""
    waiting, running = list(reversed(specs)), list[Child]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(start(waiting.pop(), timeout))
        for child in list(running):
            row = finish(child)
            if row is not None:
                running.remove(child)
                yield row
        time.sleep(POLL_SECONDS)


def write_results(rows: Sequence[Row], page: Path, data: Path) -> None:
    """Write the page and the data it was made of."""
    ordered = sorted(rows, key=lambda row: (row.family, row.name))
    facts = {"versions": versions(), "rows": [asdict(row) for row in ordered]}
    for path, text in ((data, json.dumps(facts, indent=1) + "\n"), (page, coverage_page(facts))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def versions() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        **{name: _version_of(name) for name in LIBRARIES},
        "cpu_cores": os.cpu_count(),
        "config": "block_size=2, output=sum",
    }


def _version_of(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    parser.add_argument("--limit", type=int, help="only the first N models")
    parser.add_argument("--only", default="", help="regular expression that names must match")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one model")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "zoo.json")
    parser.add_argument("--keep", action="store_true", help="keep the rows of the JSON file for all other models")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # measure one model here, for a debugger
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if options.one:
        spec = next(spec for spec in builders.everything() if spec.name == options.one)
        measure(spec, lambda row: print(json.dumps(asdict(row)), flush=True))
        return
    chosen = [spec for spec in builders.everything() if re.search(options.only, spec.name)][: options.limit]
    rows: list[Row] = []
    kept = _other_rows(options.json, {spec.name for spec in chosen}) if options.keep else []
    try:
        for row in run_all(chosen, options.jobs, options.timeout):
            rows.append(row)
            note = f"{row.updates or row.refusal or row.reason} {row.seconds:.0f} s"
            print(f"[{len(rows)}/{len(chosen)}] {row.name}: {row.outcome} {note}", flush=True)
    finally:
        # an interrupted run keeps what it has
        write_results([*kept, *rows], options.out, options.json)


def _other_rows(path: Path, names: set[str]) -> list[Row]:
    """Read the rows of an earlier run, those of `names` left out."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"] if row["name"] not in names]


if __name__ == "__main__":
    main()
