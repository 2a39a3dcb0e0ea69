"""Train one small language model three times: as it is, with Block and with Full Attention Residuals.

    python examples/evidence/train.py --preset cpu --seeds 0 1 2 --out out/evidence

All variants of a seed start from the same weights and see the same batches in the same order, so their losses are
compared in pairs. The rewritten ones come from `ar.rewrite(model, ...)`, proofs included. Each run keeps a checkpoint
in its folder and goes on from it; `RUN/result.json` has its losses and what they were made with. `summarize.py` reads
these.

    python examples/evidence/train.py --preset cpu --seeds 0 1 2 --variants gate num_heads key_rank recency_bias

trains Block with each variant of its read. --lr and --steps are for the search of the learning rate, which was made for
the original alone; --read-lr gives queries and gains another rate than the rest, --embedding-std starts from larger or
smaller embeddings.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loop import Plan, Record, Say, machine, train
from model import INIT_STD, Gpt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from settings import PRESETS, READS, VARIANTS, Preset, config_of, fields_of
from text import Corpus, load_corpus
from torch import nn

import attnres_rewrite as ar

# batches are drawn from another seed than weights, and those of the retrofit from yet another
BATCH_SEED = 1000


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    preset = PRESETS[options.preset]
    given = {name: value for name in ("lr", "steps") if (value := getattr(options, name)) is not None}
    preset = replace(preset, **given)
    console, corpus = Console(), load_corpus()
    console.print(f"{corpus.facts()}")
    for seed in options.seeds:
        for variant in options.variants:
            folder = run_folder(options.out, options.preset, variant, seed)
            record = train_variant(
                variant,
                seed,
                preset,
                corpus,
                folder,
                console,
                options.stop_at,
                options.read_lr,
                options.embedding_std,
            )
            report(console, f"{variant}, seed {seed}", record)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu", choices=PRESETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=[*VARIANTS, *READS])
    parser.add_argument("--out", type=Path, default=Path("out/evidence"))
    parser.add_argument("--lr", type=float, help="instead of the preset's")
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--read-lr", type=float, default=1.0, help="of queries and gains, times the rate of the rest")
    parser.add_argument("--embedding-std", type=float, default=INIT_STD, help="of the embeddings at the start")
    parser.add_argument("--stop-at", type=int, help="leave each run after this step; the same command goes on")
    return parser.parse_args(arguments)


def train_variant(
    variant: str,
    seed: int,
    preset: Preset,
    corpus: Corpus,
    folder: Path,
    console: Console,
    stop_at: int | None = None,
    read_lr: float = 1.0,
    embedding_std: float = INIT_STD,
) -> Record:
    """Train one variant from one seed, or go on with it, and write `result.json`."""
    model = build(variant, seed, preset, embedding_std)
    plan = Plan(preset.steps, preset.warmup, preset.lr, BATCH_SEED + seed, read_lr, embedding_std=embedding_std)
    with progress(console, f"{variant}, seed {seed}", plan.steps) as say:
        record = train(model, corpus, preset, plan, folder, say, stop_at)
    named = {"variant": variant, "seed": seed, "read": fields_of(variant), "read_lr": read_lr}
    named["embedding_std"] = embedding_std
    facts = {**named, "preset": preset.facts(), **record.facts(), **circumstances(corpus, preset)}
    write_json(folder / "result.json", facts)
    return record


def original(seed: int, preset: Preset, embedding_std: float = INIT_STD) -> Gpt:
    """Return the untrained model of a seed, on the preset's device."""
    torch.manual_seed(seed)
    return Gpt(preset.width, preset.layers, preset.heads, preset.context, embedding_std).to(preset.device)


def build(variant: str, seed: int, preset: Preset, embedding_std: float = INIT_STD) -> nn.Module:
    """Return the untrained model of a variant: the same weights for each variant of a seed."""
    return rewritten(original(seed, preset, embedding_std), variant, preset)


def rewritten(model: Gpt, variant: str, preset: Preset) -> nn.Module:
    """Return `model` as the variant has it; a rewrite that fails a proof raises."""
    config = config_of(variant, preset)
    if config is None:
        return model
    ids = torch.arange(2 * preset.context, device=preset.device).remainder(256).view(2, -1)
    return ar.rewrite(model, (ids,), config=config)


def run_folder(out: Path, preset: str, variant: str, seed: int) -> Path:
    return out / preset / f"{variant}-{seed}"


def circumstances(corpus: Corpus, preset: Preset) -> dict[str, Any]:
    """Return the text, the versions and the machine."""
    facts = machine(preset)
    return {"corpus": corpus.facts(), "device": facts.pop("device_name"), **facts}


def write_json(path: Path, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")


def report(console: Console, name: str, record: Record) -> None:
    """Say how a run ended; one whose loss was not finite is kept as far as it went."""
    if record.ended:
        console.print(f"[bold red]{name}: {record.ended}[/]; the run is kept up to there, the others go on")
    elif record.final_validation is None:
        console.print(f"{name}: stopped at step {len(record.train_loss)}; the same command goes on")
    else:
        console.print(f"{name}: validation loss {record.final_validation:.4f} in {record.seconds:.0f} s")


class progress:
    """A progress bar for one run; without a terminal, a line at each validation."""

    def __init__(self, console: Console, name: str, steps: int) -> None:
        self.console, self.name = console, name
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(name, total=steps)

    def __enter__(self) -> Say:
        self.bar.start()
        return self._say

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def _say(self, step: int, loss: float, validation: float | None) -> None:
        self.bar.update(self.task, completed=step, description=f"{self.name}, loss {loss:.3f}")
        if validation is not None:
            self.console.print(f"{self.name}: step {step}, training {loss:.4f}, validation {validation:.4f}")


if __name__ == "__main__":
    main()
