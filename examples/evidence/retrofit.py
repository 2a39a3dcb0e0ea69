"""Give a TRAINED model Attention Residuals and train it on, beside a twin that stays as it is.

    python examples/evidence/retrofit.py --preset cpu --seeds 0 1 2 --out out/evidence
    python examples/evidence/retrofit.py --preset cpu --seeds 0 1 2 --variants block gate --read-lr 16

Before: the originals that `train.py` made; one that is missing is trained now. Each is loaded once for every variant.
`ar.rewrite` proves that its outputs and gradients did not change, and the validation loss is measured right before and
right after it; a recency bias without a gate makes another function of it, which the second loss shows. All of them
then go on with equal batches, new to them, and equal new optimizers. Results are in `RETROFIT-RUN/result.json`, those
of another rate of the reads under `OUT/read_lr/RATE`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from loop import Plan, Record, train, validate
from rich.console import Console
from settings import PRESETS, READS, RETROFIT_READS, VARIANTS, Preset, fields_of
from text import Corpus, load_corpus
from train import (
    BATCH_SEED,
    circumstances,
    original,
    progress,
    report,
    rewritten,
    run_folder,
    train_variant,
    write_json,
)

RETROFIT_BATCH_SEED = 2 * BATCH_SEED


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu", choices=PRESETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=[*VARIANTS, *READS, *RETROFIT_READS])
    parser.add_argument("--read-lr", type=float, default=1.0, help="of queries and gains, times the rate of the rest")
    parser.add_argument("--out", type=Path, default=Path("out/evidence"))
    options = parser.parse_args(arguments)
    preset, corpus, console = PRESETS[options.preset], load_corpus(), Console()
    results = options.out if options.read_lr == 1 else options.out / "read_lr" / f"{options.read_lr:g}"
    for seed in options.seeds:
        pretrained = run_folder(options.out, options.preset, "original", seed)
        if train_variant("original", seed, preset, corpus, pretrained, console).final_validation is None:
            console.print(
                f"[bold red]seed {seed}: its original was not trained to the end[/]; there is nothing to rewrite"
            )
            continue
        for variant in options.variants:
            folder = run_folder(results, options.preset, f"retrofit-{variant}", seed)
            record = continue_variant(variant, seed, preset, corpus, pretrained, folder, console, options.read_lr)
            report(console, f"retrofit, {variant}, seed {seed}", record)


def continue_variant(
    variant: str,
    seed: int,
    preset: Preset,
    corpus: Corpus,
    pretrained: Path,
    folder: Path,
    console: Console,
    read_lr: float = 1.0,
) -> Record:
    """Rewrite the checkpoint in `pretrained` as the variant has it, train it on, and write `result.json`."""
    model = original(seed, preset)
    state = torch.load(pretrained / "checkpoint.pt", map_location=preset.device, weights_only=True)
    model.load_state_dict(state["model"])
    before = validate(model, corpus.validation, preset, preset.final_windows)
    model = rewritten(model, variant, preset)
    after = validate(model, corpus.validation, preset, preset.final_windows)
    console.print(f"{variant}, seed {seed}: validation loss {before:.6f} before the rewrite, {after:.6f} after it")
    # a fifth of the steps to warm up: the optimizer knows nothing yet
    warmup, batch_seed = preset.retrofit_steps // 5, RETROFIT_BATCH_SEED + seed
    started_at = state["record"]["final_validation"]
    plan = Plan(preset.retrofit_steps, warmup, preset.retrofit_lr, batch_seed, read_lr, started_at)
    with progress(console, f"retrofit, {variant}, seed {seed}", plan.steps) as say:
        record = train(model, corpus, preset, plan, folder, say)
    facts = {
        "variant": variant,
        "seed": seed,
        "read": fields_of(variant),
        "read_lr": read_lr,
        "preset": preset.facts(),
        "before_rewrite": before,
        "after_rewrite": after,
        **record.facts(),
        **circumstances(corpus, preset),
    }
    write_json(folder / "result.json", facts)
    return record


if __name__ == "__main__":
    main()
