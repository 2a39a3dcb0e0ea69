"""Look into the trained networks: magnitudes, gradients and depth-attention maps, Block and Full beside the original.

    python examples/evidence/look.py --preset cpu --seeds 0 1 2 --out out/evidence --figures docs/figures

Each rewritten network is diagnosed on validation text with `ar.diagnose`, and beside it the original that was trained
from the same seed. Figures are of the first seed; `OUT/PRESET/look.json` has the facts, means over the seeds, and
`RUN/diagnosis.json` every figure.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from loop import windows
from settings import PRESETS, Preset
from summarize import spread
from text import Corpus, load_corpus
from torch import Tensor
from train import build, write_json

import attnres_rewrite as ar
from attnres_rewrite.plots import save_plots

BATCHES = 16
Diagnoses = Mapping[str, Mapping[int, ar.Diagnosis]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu", choices=PRESETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=["block", "full"], choices=["block", "full"])
    parser.add_argument("--out", type=Path, default=Path("out/evidence"))
    parser.add_argument("--figures", type=Path, help="a folder for the pictures")
    options = parser.parse_args(arguments)
    preset, corpus = PRESETS[options.preset], load_corpus()
    found: dict[str, dict[int, ar.Diagnosis]] = {variant: {} for variant in options.variants}
    for variant, diagnoses in found.items():
        for seed in options.seeds:
            diagnoses[seed] = diagnose(variant, seed, preset, corpus, options.out / options.preset)
            diagnoses[seed].save(options.out / options.preset / f"{variant}-{seed}" / "diagnosis.json", force=True)
            print(
                f"{variant}, seed {seed}: loss {diagnoses[seed].loss:.4f}, original {diagnoses[seed].baseline_loss:.4f}"
            )
        if options.figures:
            save_plots(diagnoses[options.seeds[0]], options.figures / f"evidence_{variant}", ("svg",), force=True)
    facts = {"seeds": options.seeds, "batches": BATCHES, "dynamics": dynamics(found), "maps": maps(found)}
    write_json(options.out / options.preset / "look.json", facts)


def diagnose(variant: str, seed: int, preset: Preset, corpus: Corpus, folder: Path) -> ar.Diagnosis:
    """Diagnose a trained network beside the original of its seed."""
    new = build(variant, seed, preset)
    new.load_state_dict(_trained(folder / f"{variant}-{seed}", preset))
    starts = torch.linspace(0, len(corpus.validation) - preset.context - 1, BATCHES * preset.batch).long()
    # the loss is of the next byte within a window
    batches = [windows(corpus.validation, part, preset)[:, :-1] for part in starts.split(preset.batch)]
    return ar.diagnose(new.eval(), batches, baseline=_trained(folder / f"original-{seed}", preset))


def _trained(folder: Path, preset: Preset) -> dict[str, Tensor]:
    state = torch.load(folder / "checkpoint.pt", map_location=preset.device, weights_only=True)
    if state["record"]["final_validation"] is None:
        why = state["record"]["ended"] or f"it stopped at step {len(state['record']['train_loss'])}"
        raise ValueError(f"{folder} was not trained to the end, {why}: leave its seed out of --seeds")
    return state["model"]


def dynamics(found: Diagnoses) -> dict[str, Any]:
    """Return, by variant and figure, values by seed, mean and spread: magnitudes and gradients over depth."""
    # the original is the same beside each
    sides = {"original": (next(iter(found.values())), True)} | {name: (one, False) for name, one in found.items()}
    figures: dict[str, Callable[[Sequence[float], Sequence[float], Sequence[float]], float]] = {
        "update_last_to_first": lambda updates, sums, gradients: updates[-1] / updates[0],
        "update_max_to_min": lambda updates, sums, gradients: max(updates) / min(updates),
        "sum_last_to_first": lambda updates, sums, gradients: sums[-1] / sums[0],
        "sum_last_to_second": lambda updates, sums, gradients: sums[-1] / sums[1],
        "sum_max": lambda updates, sums, gradients: max(sums),
        "gradient_variation": lambda updates, sums, gradients: _variation(gradients),
        "gradient_variation_from_second": lambda updates, sums, gradients: _variation(gradients[1:]),
        "gradient_first_to_last": lambda updates, sums, gradients: gradients[0] / gradients[-1],
    }
    return {
        variant: {
            name: spread({seed: figure(*_over_depth(one, baseline)) for seed, one in diagnoses.items()})
            for name, figure in figures.items()
        }
        for variant, (diagnoses, baseline) in sides.items()
    }


def _over_depth(diagnosis: ar.Diagnosis, baseline: bool) -> tuple[list[float], list[float], list[float]]:
    """Return the RMS of updates, the RMS of sums and the gradient norms, from the first update to the last."""
    prefix = "baseline_" if baseline else ""
    updates = diagnosis.streams[0].updates
    names = (f"{prefix}output_rms", f"{prefix}sum_rms", f"{prefix}gradient_norm")
    first, second, third = ([getattr(update, name) for update in updates] for name in names)
    return first, second, third


def _variation(values: Sequence[float]) -> float:
    return statistics.pstdev(values) / statistics.fmean(values)


def maps(found: Diagnoses) -> dict[str, Any]:
    """Return, by variant and figure, values by seed with mean and spread: where the reads look."""
    by_seed = {name: {seed: _pattern(one) for seed, one in diagnoses.items()} for name, diagnoses in found.items()}
    return {
        variant: {
            name: spread({seed: pattern[name] for seed, pattern in patterns.items()})
            for name in next(iter(patterns.values()))
        }
        for variant, patterns in by_seed.items()
    }


def _pattern(diagnosis: ar.Diagnosis) -> dict[str, float]:
    """Return mean weights and shares, over the reads of one network; the final read counts in the shares alone."""
    reads = diagnosis.streams[0].reads
    pattern: dict[str, float] = {}
    for kind in ("attention", "mlp"):
        before = [read for read in reads if read.before == kind]
        pattern[f"newest_before_{kind}"] = statistics.fmean(read.weights[-1] for read in before)
        pattern[f"embedding_before_{kind}"] = statistics.fmean(read.weights[0] for read in before)
        pattern[f"uniform_before_{kind}"] = statistics.fmean(1 / len(read.weights) for read in before)
    largest = [max(range(len(read.weights)), key=read.weights.__getitem__) for read in reads]
    pattern["largest_is_newest"] = statistics.fmean(
        index == len(read.weights) - 1 for index, read in zip(largest, reads, strict=True)
    )
    pattern["largest_is_embedding"] = statistics.fmean(index == 0 for index in largest)
    pattern["effective_share"] = statistics.fmean(read.effective_sources / len(read.weights) for read in reads)
    return pattern


if __name__ == "__main__":
    main()
