"""The page of the benchmarks: a place `<!-- measured: NAME -->` becomes a table of benchmarks/results/NAME.json."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PLACE = re.compile(r"<!-- measured: (\w+) -->")
STEPS = {"forward": "forward pass", "train": "training step", "compile": "compiling, from empty caches"}
VARIANTS = {
    "original": "the original",
    "direct": 'the rewrite, `schedule="direct"`',
    "two_phase": 'the rewrite, `schedule="two_phase"`',
    "auto": 'the rewrite, `schedule="auto"`',
    "backend": 'attached, `backend="attnres"`',
    "naive": "written by hand, with a stack",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the places, where a page has some."""
    return PLACE.sub(lambda place: measured(place[1]), markdown)


def measured(name: str) -> str:
    """Return the results of one benchmark as Markdown: where it ran, and a table."""
    facts = json.loads((RESULTS / f"{name}.json").read_text())
    return TABLES[name](facts)


def _step(facts: Mapping[str, Any]) -> str:
    settings, machine = facts["settings"], facts["machine"]
    heading = (
        f"Measured on {machine['device']}, torch {machine['torch']}, commit {machine['commit']}: {settings['layers']} "
        f"layers, width {settings['width']}, {settings['tokens']} tokens, batch {settings['batch']}, "
        f"{settings['blocks']} blocks, {settings['dtype']}, median of {settings['rounds']} rounds."
    )
    rows = [
        (STEPS[row["step"]], VARIANTS[row["variant"]], f"{row['ms']:,.0f}", f"{row['ratio']:.2f}")
        for row in facts["rows"]
    ]
    return f"{heading}\n\n{_table(('', 'network', 'ms', 'times the original'), rows)}"


def _passes(facts: Mapping[str, Any]) -> str:
    heading = (
        f"Measured on {facts['device']}, torch {facts['torch']}, transformers {facts['transformers']}, median of "
        f"{facts['runs']} runs."
    )
    rows = [
        (
            str(row["layers"]),
            f"{row['nodes']:,}",
            f"{row['capture_s']:.1f}",
            f"{row['passes_s']:.2f}",
            f"{row['passes_us_per_node']:.0f}",
        )
        for row in facts["rows"]
    ]
    columns = ("layers", "nodes of the graph", "capture, s", "passes, s", "passes, µs a node")
    return f"{heading}\n\n{_table(columns, rows)}"


def _zoo(facts: Mapping[str, Any]) -> str:
    versions, models = facts["versions"], facts["rows"]
    proven = [row for row in models if row["outcome"] == "proven"]
    heading = (
        f"Measured on {versions['cpu_cores']} CPU cores, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, timm {versions['timm']}, diffusers {versions['diffusers']}; {versions['config']}."
    )
    outcomes = Counter(row["outcome"] for row in models)
    rows = [
        ("models", str(len(models))),
        *((outcome, str(count)) for outcome, count in outcomes.most_common()),
        ("largest error of an output against the original", f"{max(row['original'][0] for row in proven):.0e}"),
        ("largest error of a gradient against the original", f"{max(row['original'][1] for row in proven):.0e}"),
    ]
    return f"{heading}\n\n{_table(('', ''), rows)}"


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "step_cpu": _step,
    "step_cpu_avx512": _step,
    "passes": _passes,
    "zoo": _zoo,
}


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
