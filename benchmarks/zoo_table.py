"""Lay out the results of benchmarks/zoo.py as docs/coverage.md: facts -> markdown."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Facts = Mapping[str, Any]

# whose versions stand on the page
LIBRARIES = ("torch", "transformers", "timm", "diffusers")

OUTCOMES = {
    "proven": "rewritten, every proof holds",
    "refused": "refused with a reason",
    "not captured": "torch.export cannot trace it",
    "unproven": "rewritten, a proof failed",
    "failed": "an error that is no refusal",
    "crashed": "its process died",
    "timeout": "out of time",
    "not run": "the model itself does not run on these inputs",
    "not built": "no small configuration",
}


def coverage_page(facts: Facts) -> str:
    """Return the whole page. `facts` is what benchmarks/zoo.py writes as JSON."""
    rows: Sequence[Facts] = facts["rows"]
    parts = [
        "# Coverage",
        _preface(facts["versions"], len(rows)),
        "## In numbers",
        _summary(rows),
        "## Refused, by class",
        _refusals(rows),
        "## Every model",
        _legend(),
        _table(sorted(rows, key=lambda row: (row["name"].lower(), row["family"]))),
        "## Not rewritten, and why",
        _reasons(rows),
    ]
    return "\n\n".join(parts) + "\n"


def _preface(versions: Facts, count: int) -> str:
    named = ", ".join(f"{name} {versions[name]}" for name in LIBRARIES)
    return (
        f"`python benchmarks/zoo.py` wrote this page: {count} models with random weights, {named}, on "
        f"{versions['cpu_cores']} CPU cores, {versions['config']}. The families named after a task are every "
        "class of the model tables of transformers, each from one generic small configuration (three layers, "
        "width 64). The updates of the families `transformers`, `diffusers` and `hand-written`, and of part of `timm`, "
        "were counted by hand."
    )


def _summary(rows: Sequence[Facts]) -> str:
    families = sorted({row["family"] for row in rows})
    header = ["family", "models", "built", "run eagerly", "captured", "proven", "refused", "other"]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for family in [*families, "all"]:
        mine = [row for row in rows if family in (row["family"], "all")]
        lines.append(_line([family, *map(str, _counts(mine))]))
    counted = [row for row in rows if row["expected"] is not None]
    right = sum(_as_counted(row) for row in counted)
    return "\n".join(lines) + f"\n\nOf {len(counted)} models with a hand count, {right} gave exactly that."


def _counts(rows: Sequence[Facts]) -> list[int]:
    outcomes = Counter(row["outcome"] for row in rows)
    built = len(rows) - outcomes["not built"]
    run = built - outcomes["not run"]
    # a model that died or ran out of time before the capture was over was not captured
    lost = [row for row in rows if row["outcome"] in ("crashed", "timeout", "failed")]
    stuck = sum("capture" in row["during"] for row in lost)
    captured = run - outcomes["not captured"] - stuck
    other = captured - outcomes["proven"] - outcomes["refused"]
    return [len(rows), built, run, captured, outcomes["proven"], outcomes["refused"], other]


def _as_counted(row: Facts) -> bool:
    expected = row["expected"]
    if isinstance(expected, str):
        return row["outcome"] in ("refused", "not captured") and row["refusal"] == expected
    return row["outcome"] == "proven" and row["updates"] == expected


def _refusals(rows: Sequence[Facts]) -> str:
    classes = Counter(row["refusal"] for row in rows if row["outcome"] in ("refused", "not captured"))
    lines = [_line(["class", "models"]), _line(["---", "---:"])]
    return "\n".join([*lines, *(_line([name, str(count)]) for name, count in sorted(classes.items()))])


def _legend() -> str:
    return (
        "*updates* of each stream; *reads* inserted; *original* and *independent* are the relative errors, "
        "output / gradient, the worse of train and eval mode, in float64 unless an operation has no such "
        "kernel: against the original model at zero queries, and against the independent interpreter at "
        "random ones."
    )


def _table(rows: Iterable[Facts]) -> str:
    header = ["model", "family", "outcome", "updates", "reads", "original", "independent", "s"]
    lines = [_line(header), _line(["---"] * 4 + ["---:"] + ["---"] * 2 + ["---:"])]
    for row in rows:
        outcome = row["refusal"] if row["outcome"] == "refused" else row["outcome"]
        updates = ", ".join(map(str, row["updates"]))
        if row["expected"] is not None and not _as_counted(row):
            updates = f"{updates} (by hand: {row['expected']})".strip()
        what = [row["name"], row["family"], outcome, updates, str(row["reads"] or "")]
        figures = [_errors(row["original"]), _errors(row["independent"]), f"{row['seconds']:.0f}"]
        lines.append(_line([*what, *figures]))
    return "\n".join(lines)


def _errors(errors: Sequence[float | None]) -> str:
    # one digit: the rounding of a sum differs from run to run
    return " / ".join("-" if error is None else f"{error:.0e}" for error in errors)


def _reasons(rows: Sequence[Facts]) -> str:
    lines: list[str] = []
    for outcome, meaning in OUTCOMES.items():
        mine = sorted((row for row in rows if row["outcome"] == outcome), key=lambda row: row["name"].lower())
        if outcome == "proven" or not mine:
            continue
        lines.append(f"### {outcome}: {meaning} ({len(mine)})\n")
        for row in mine:
            refusal = f"{row['refusal']}: " if row["refusal"] else ""
            lines.append(f"* `{row['name']}` {refusal}{_escape(row['reason'])}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
