"""The results of all runs -> one JSON file, and the tables of a page.

    python examples/evidence/summarize.py --preset cpu --out out/evidence \\
        --json benchmarks/results/evidence_cpu.json --page docs/evidence.md
    python examples/evidence/summarize.py --tables --json benchmarks/results/evidence_cpu.json --page docs/evidence.md

The first collects what `train.py`, `retrofit.py`, `throughput.py` and `look.py` left under --out; the second only
writes the tables again. A page has its tables between lines `<!-- table: NAME -->` and `<!-- end -->`; the rest is left
alone. A run that did not end, or whose loss was not finite, is listed and counts in no mean.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model import INIT_STD
from settings import PRESETS, READS, RETROFIT_READS, VARIANTS
from tables import TABLES

Facts = dict[str, Any]
ORDER = (*VARIANTS, *READS, *RETROFIT_READS)
# what all runs of one comparison must share
SHARED = ("corpus", "torch", "attnres_rewrite", "device", "threads", "preset")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu", choices=PRESETS)
    parser.add_argument("--out", type=Path, default=Path("out/evidence"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/evidence_cpu.json"))
    parser.add_argument("--page", type=Path, help="the page whose tables are written again")
    parser.add_argument("--tables", action="store_true", help="only that, from the JSON file as it is")
    options = parser.parse_args(arguments)
    if not options.tables:
        facts = collect(options.out, options.preset)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(dumps(facts))
        print(f"wrote {options.json}")
    if options.page:
        options.page.write_text(with_tables(options.page.read_text(), json.loads(options.json.read_text())))
        print(f"wrote the tables of {options.page}")


def collect(out: Path, preset: str) -> Facts:
    """Return what the runs of a preset under `out` show together.

    Raises:
        FileNotFoundError: There is no run.
        ValueError: Runs differ in text, versions, machine, preset, start or the rate of their reads, so they do not
            compare.
    """
    folder = out / preset
    runs, retrofits = _runs(out, preset)
    other_rates, retrofits_at_other_rates = _runs(out, f"read_lr/*/{preset}")
    if not runs:
        raise FileNotFoundError(f"no run under {folder}: train.py makes them")
    if len(rates := {run["read_lr"] for run in (*runs, *retrofits)}) > 1:
        raise ValueError(f"the runs under {folder} were made with --read-lr {sorted(rates)}")
    if len(stds := {_embedding_std(run) for run in runs}) > 1:
        raise ValueError(f"the runs under {folder} were made with --embedding-std {sorted(stds)}")
    other_starts, _ = _runs(out, f"embedding_std/*/{preset}")
    shared = _shared([*runs, *retrofits, *other_rates, *retrofits_at_other_rates, *other_starts])
    facts: Facts = dict(shared)
    facts["lr_search"] = _lr_search(out, "lr", INIT_STD)
    facts["training"] = compare(runs)
    facts["read_lr"] = _by_rate(other_rates)
    facts["embedding_std"] = {
        f"{std:g}": {
            **compare(run for run in other_starts if _embedding_std(run) == std),
            "lr_search": _lr_search(out, "embedding_std/*/lr", std),
        }
        for std in sorted(map(_embedding_std, other_starts))
    }
    facts["retrofit"] = compare(retrofits) if retrofits else None
    facts["retrofit_read_lr"] = _by_rate(retrofits_at_other_rates)
    for name in ("throughput", "look"):
        path = folder / f"{name}.json"
        facts[name] = _read(path) if path.exists() else None
    return facts


def _runs(out: Path, folder: str) -> tuple[list[Facts], list[Facts]]:
    """Return the runs from the start and the retrofits in the folders that match."""
    found: tuple[list[Facts], list[Facts]] = [], []
    for path in sorted(out.glob(f"{folder}/*/result.json")):
        found[path.parent.name.startswith("retrofit-")].append(_read(path))
    return found


def _lr_search(out: Path, folder: str, std: float) -> list[Facts]:
    runs = sorted(map(_read, out.glob(f"{folder}/*/*/*/result.json")), key=lambda run: run["preset"]["lr"])
    return [
        {"lr": run["preset"]["lr"], "steps": run["preset"]["steps"], "final_validation": run["final_validation"]}
        for run in runs
        if _embedding_std(run) == std
    ]


def _embedding_std(run: Mapping[str, Any]) -> float:
    return run.get("embedding_std", INIT_STD)


def _by_rate(runs: Sequence[Facts]) -> Facts:
    rates = sorted({run["read_lr"] for run in runs})
    return {f"{rate:g}": compare(run for run in runs if run["read_lr"] == rate) for rate in rates}


def compare(runs: Iterable[Mapping[str, Any]]) -> Facts:
    """Return runs, means and spread of each variant, and its differences to the original and Block of the same seed."""
    own = [{name: value for name, value in run.items() if name not in SHARED} for run in runs]
    own.sort(key=lambda run: (run["seed"], ORDER.index(run["variant"])))
    final = {(run["variant"], run["seed"]): run["final_validation"] for run in own}
    final = {key: loss for key, loss in final.items() if loss is not None}
    losses = {name: {seed: loss for (variant, seed), loss in final.items() if variant == name} for name in ORDER}
    return {
        "final_validation": {name: spread(found) for name, found in losses.items() if found},
        "difference_to_original": _differences(losses, "original"),
        "difference_to_block": _differences(losses, "block"),
        "left_out": [
            f"{run['variant']}, seed {run['seed']}: {run['ended'] or 'not trained to the end'}"
            for run in own
            if run["final_validation"] is None
        ],
        "runs": own,
    }


def _differences(losses: Mapping[str, Mapping[int, float]], base: str) -> Facts:
    """Return, for each variant behind `base` in `ORDER`, its losses less those of `base`, by seed."""
    behind = ORDER[ORDER.index(base) + 1 :]
    paired = {name: losses[name].keys() & losses[base].keys() for name in behind}
    return {
        name: spread({seed: losses[name][seed] - losses[base][seed] for seed in seeds})
        for name, seeds in paired.items()
        if seeds
    }


def spread(by_seed: Mapping[int, float]) -> Facts:
    """Return values by seed, their mean, and their sample standard deviation, None for a single one."""
    values = list(by_seed.values())
    return {
        "by_seed": {str(seed): round(value, 6) for seed, value in sorted(by_seed.items())},
        "mean": round(statistics.fmean(values), 6),
        "sd": round(statistics.stdev(values), 6) if len(values) > 1 else None,
    }


def with_tables(page: str, facts: Facts) -> str:
    """Return `page` with every marked table made from `facts`.

    Raises:
        ValueError: The page asks for a table that there is none of, or has no end for one.
    """

    def made(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            raise ValueError(f"the page asks for a table {name!r}; there are {', '.join(TABLES)}")
        table: Callable[[Facts], str] = TABLES[name]
        return f"<!-- table: {name} -->\n\n{table(facts)}\n\n<!-- end -->"

    starts, ends = page.count("<!-- table: "), page.count("<!-- end -->")
    if starts != ends:
        raise ValueError(f"the page has {starts} starts of a table and {ends} ends")
    return re.sub(r"<!-- table: (?P<name>\w+) -->.*?<!-- end -->", made, page, flags=re.DOTALL)


def dumps(facts: Facts) -> str:
    """Return JSON with an item a line, but for lists of numbers."""
    text = json.dumps(facts, indent=1, allow_nan=False)
    return re.sub(r"\[[-\d.,\s\[\]enul]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def _read(path: Path) -> Facts:
    return json.loads(path.read_text())


def _shared(runs: Sequence[Facts]) -> Facts:
    for name in SHARED:
        found = {json.dumps(run[name], sort_keys=True) for run in runs}
        if len(found) > 1:
            raise ValueError(f"the runs were made with {len(found)} values of {name}: {'; '.join(sorted(found))}")
    return {name: runs[0][name] for name in SHARED}


if __name__ == "__main__":
    main()
