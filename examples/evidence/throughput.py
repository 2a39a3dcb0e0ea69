"""Time a training step of the three variants, one after the other in turns.

    python examples/evidence/throughput.py --preset cpu --rounds 20 --out out/evidence

In turns, because a slow moment of the machine then meets them all: the ratio to the original is the median of the
ratios round by round. Times of separate runs (`seconds` in their results) do not compare so well.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from loop import draw, optimizer_for, training_step
from settings import PRESETS, VARIANTS, Preset
from text import Corpus, load_corpus
from torch import nn
from train import build, circumstances, write_json

WARM_UP_ROUNDS = 2


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu", choices=PRESETS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out/evidence"))
    options = parser.parse_args(arguments)
    preset, corpus = PRESETS[options.preset], load_corpus()
    rows = measure({variant: build(variant, 0, preset) for variant in VARIANTS}, preset, corpus, options.rounds)
    for name, row in rows.items():
        print(f"{name:9} {row['ms']:8.1f} ms a step, {row['bytes_per_second']:8.0f} bytes/s, x{row['ratio']:.3f}")
    facts = {"preset": preset.facts(), "rounds": options.rounds, "variants": rows, **circumstances(corpus, preset)}
    write_json(options.out / options.preset / "throughput.json", facts)


def measure(models: Mapping[str, nn.Module], preset: Preset, corpus: Corpus, rounds: int) -> dict[str, dict[str, Any]]:
    """Return, for each variant, the median of a step in ms, bytes a second, and the ratio to the original."""
    steps = {variant: _step_of(model, preset, corpus) for variant, model in models.items()}
    seconds: dict[str, list[float]] = {variant: [] for variant in models}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for variant, step in steps.items():
            _wait(preset)
            start = time.perf_counter()
            step()
            _wait(preset)
            if turn >= WARM_UP_ROUNDS:
                seconds[variant].append(time.perf_counter() - start)
    rows: dict[str, dict[str, Any]] = {}
    for variant, measured in seconds.items():
        median = statistics.median(measured)
        ratios = [ours / theirs for ours, theirs in zip(measured, seconds["original"], strict=True)]
        rows[variant] = {
            "ms": round(1e3 * median, 2),
            "bytes_per_second": round(preset.batch * preset.context / median),
            "ratio": round(statistics.median(ratios), 3),
        }
    return rows


def _step_of(model: nn.Module, preset: Preset, corpus: Corpus) -> Callable[[], float]:
    run = torch.compile(model) if preset.compile else model
    optimizer, batches = optimizer_for(model, preset.lr, preset), torch.Generator().manual_seed(0)
    return lambda: training_step(run, draw(corpus.train, preset, batches), optimizer, preset)


def _wait(preset: Preset) -> None:
    """Wait for a GPU: the loss is fetched before the backward, which would be timed with the next variant's step."""
    if preset.device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
