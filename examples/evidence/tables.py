"""The collected results -> Markdown tables of the evidence page, by name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from model import INIT_STD
from settings import READS, RETROFIT_READS, VARIANTS

Facts = Mapping[str, Any]
NAMES = {"original": "original", "block": "Block", "full": "Full"} | {
    name: f"Block, {', '.join(f'`{field}={value}`' for field, value in fields.items())}"
    for name, fields in (READS | RETROFIT_READS).items()
}
NOT_RUN = "Not run."


def setup(facts: Facts) -> str:
    """What was trained, on what, where."""
    preset, corpus = facts["preset"], facts["corpus"]
    read = preset["steps"] * preset["batch"] * preset["context"]
    rows = [
        ["model", f"{preset['layers']} layers, {2 * preset['layers']} updates, width {preset['width']}"],
        ["Block", f"{preset['blocks']} blocks"],
        ["text", f"{corpus['text']}, bytes; SHA-256 `{corpus['sha256'][:16]}`"],
        ["to train on", f"{corpus['train_bytes']:,} bytes of {corpus['train_files']} files"],
        ["to validate on", f"{corpus['validation_bytes']:,} bytes of {corpus['validation_files']} other files"],
        ["steps", f"{preset['steps']} of {preset['batch']} x {preset['context']} bytes: {read:,} bytes"],
        ["final validation", f"{preset['final_windows']} windows of {preset['context']} bytes, the same for all"],
        ["learning rate", f"{preset['lr']:g}, {preset['warmup']} steps of warm-up, cosine to a tenth"],
        ["machine", f"{facts['device']}, {facts['threads']} thread, torch {facts['torch']}"],
    ]
    return _table(["", ""], rows)


def lr_search(facts: Facts) -> str:
    """The search of the learning rate, of the original alone."""
    rows = [[f"{run['lr']:g}", str(run["steps"]), _loss(run["final_validation"])] for run in facts["lr_search"]]
    return _table(["learning rate", "steps", "validation loss of the original"], rows)


def losses(facts: Facts) -> str:
    """Final validation losses of the training from the start."""
    return _losses(facts["training"], VARIANTS)


def differences(facts: Facts) -> str:
    """Differences to the original of the same seed."""
    return _differences(facts["training"], "original", VARIANTS)


def curve(facts: Facts) -> str:
    """Validation losses on the way, means over the seeds."""
    runs = [run for run in facts["training"]["runs"] if run["final_validation"] is not None]
    found = {name: [run["validation"] for run in runs if run["variant"] == name] for name in VARIANTS}
    rows: list[list[str]] = []
    for index, (step, _) in enumerate(runs[0]["validation"]):
        means = [_mean([points[index][1] for points in found[name]]) for name in VARIANTS]
        rows.append([str(step), *map(_loss, means)])
    return _table(["step", *(NAMES[name] for name in VARIANTS)], rows)


def read_variants(facts: Facts) -> str:
    """Final validation losses of Block with each variant of its read."""
    return _losses(facts["training"], ["block", *READS])


def read_variant_differences(facts: Facts) -> str:
    """Differences of the variants of a read to Block of the same seed."""
    return _differences(facts["training"], "block", READS)


def read_lr(facts: Facts) -> str:
    """Final validation losses of Block and Full, their reads at the rate of the rest and at others."""
    if not facts["read_lr"]:
        return NOT_RUN
    by_rate = {"1": facts["training"], **facts["read_lr"]}
    seeds = sorted({seed for found in facts["read_lr"].values() for seed in _seeds(found["final_validation"])})
    rows: list[list[str]] = []
    for rate, found in sorted(by_rate.items(), key=lambda item: float(item[0])):
        sides = [(NAMES[name], found["final_validation"].get(name), _loss) for name in ("block", "full")]
        sides.append(("Full less Block", found["difference_to_block"].get("full"), _signed))
        for label, row, spelled in sides:
            rows.append([f"x{rate}", label, *_by_seed(row, seeds, spelled)])
    return _table(["rate of the reads", "", *(f"seed {seed}" for seed in seeds), "mean"], rows)


def embedding_std(facts: Facts) -> str:
    """Final validation losses of models whose embeddings start larger, beside those of the others."""
    if not facts["embedding_std"]:
        return NOT_RUN
    by_std = {f"{INIT_STD:g}": facts["training"], **facts["embedding_std"]}
    seeds = sorted({seed for found in facts["embedding_std"].values() for seed in _seeds(found["final_validation"])})
    rows: list[list[str]] = []
    for std, found in sorted(by_std.items(), key=lambda item: float(item[0])):
        losses, less = found["final_validation"], found["difference_to_original"]
        sides = [(NAMES[name], losses.get(name), _loss) for name in VARIANTS]
        sides += [(f"{NAMES[name]} less the original", less.get(name), _signed) for name in VARIANTS[1:]]
        rows += [[std, label, *_by_seed(row, seeds, spelled)] for label, row, spelled in sides]
    return _table(["s.d. of embeddings", "", *(f"seed {seed}" for seed in seeds), "mean"], rows)


def embedding_std_lr_search(facts: Facts) -> str:
    """The search of the learning rate of the original, from each start."""
    if not facts["embedding_std"]:
        return NOT_RUN
    by_std = {f"{INIT_STD:g}": facts, **facts["embedding_std"]}
    rows = [
        [std, *(_loss(run["final_validation"]) for run in found["lr_search"])]
        for std, found in sorted(by_std.items(), key=lambda item: float(item[0]))
    ]
    return _table(["s.d. of embeddings", *(f"at {run['lr']:g}" for run in facts["lr_search"])], rows)


def throughput(facts: Facts) -> str:
    """Time of a training step."""
    if facts["throughput"] is None:
        return NOT_RUN
    rows = [
        [NAMES[name], f"{row['ms']:.0f} ms", f"{row['bytes_per_second']:,}", f"x{row['ratio']:.2f}"]
        for name, row in facts["throughput"]["variants"].items()
    ]
    return _table(["", "median step", "bytes a second", "to the original"], rows)


def retrofit_proof(facts: Facts) -> str:
    """Validation losses right before and right after the rewrite of a trained model."""
    if facts["retrofit"] is None:
        return NOT_RUN
    rows = [
        [str(run["seed"]), NAMES[run["variant"]], f"{run['before_rewrite']:.7f}", f"{run['after_rewrite']:.7f}"]
        for run in facts["retrofit"]["runs"]
        if run["variant"] != "original"
    ]
    return _table(["seed", "rewritten as", "before the rewrite", "after it"], rows)


def retrofit_losses(facts: Facts) -> str:
    """Final validation losses of the retrofit."""
    return NOT_RUN if facts["retrofit"] is None else _losses(facts["retrofit"], NAMES)


def retrofit_differences(facts: Facts) -> str:
    """Differences of the retrofit to the twin of the same seed."""
    return NOT_RUN if facts["retrofit"] is None else _differences(facts["retrofit"], "original", NAMES)


def retrofit_read_lr(facts: Facts) -> str:
    """Differences of the retrofit to the twin of the same seed, the reads at the rate of the rest and at others.

    The twin has no reads, so it is the same for all rates.
    """
    if not facts["retrofit_read_lr"]:
        return NOT_RUN
    by_rate = {"1": facts["retrofit"], **facts["retrofit_read_lr"]}
    tried = {name for found in facts["retrofit_read_lr"].values() for name in found["final_validation"]}
    twins = facts["retrofit"]["final_validation"]["original"]["by_seed"]
    rows: list[list[str]] = []
    for rate, found in by_rate.items():
        for name in sorted(tried, key=list(NAMES).index):
            # a run that was not finite has no loss
            losses = found["final_validation"].get(name, {"by_seed": {}})["by_seed"]
            less = {seed: losses[seed] - twins[seed] for seed in twins if seed in losses}
            mean = _mean(list(less.values()))
            rows.append([f"x{rate}", NAMES[name], *(_signed(less.get(seed)) for seed in twins), _signed(mean)])
    return _table(["rate of the reads", "less the original", *(f"seed {seed}" for seed in twins), "mean"], rows)


def dynamics(facts: Facts) -> str:
    """Magnitudes and gradients over depth."""
    if facts["look"] is None:
        return NOT_RUN
    rows = [
        [label, *(_number(facts["look"]["dynamics"][name][key]) for name in VARIANTS)]
        for key, label in (
            ("update_last_to_first", "RMS of the last update, to that of the first"),
            ("update_max_to_min", "largest RMS of an update, to the smallest"),
            ("sum_last_to_first", "RMS of the last sum, to that of the first"),
            ("sum_last_to_second", "RMS of the last sum, to that of the second"),
            ("sum_max", "largest RMS of a sum"),
            ("gradient_variation", "gradient norms of updates, coefficient of variation"),
            ("gradient_variation_from_second", "the same without the first update"),
            ("gradient_first_to_last", "gradient norm of the first update, to that of the last"),
        )
    ]
    return _table(["", *(NAMES[name] for name in VARIANTS)], rows)


def maps(facts: Facts) -> str:
    """Where the reads look."""
    if facts["look"] is None:
        return NOT_RUN
    rows = [
        [label, *(_number(facts["look"]["maps"][name][key]) for name in ("block", "full"))]
        for key, label in (
            ("newest_before_attention", "weight of the newest source, reads before attention"),
            ("newest_before_mlp", "weight of the newest source, reads before an MLP"),
            ("uniform_before_attention", "a uniform weight, reads before attention"),
            ("uniform_before_mlp", "a uniform weight, reads before an MLP"),
            ("embedding_before_attention", "weight of the embedding, reads before attention"),
            ("embedding_before_mlp", "weight of the embedding, reads before an MLP"),
            ("largest_is_newest", "share of reads whose largest weight is the newest source"),
            ("largest_is_embedding", "share of reads whose largest weight is the embedding"),
            ("effective_share", "effective number of sources, to their number"),
        )
    ]
    return _table(["", "Block", "Full"], rows)


def _losses(compared: Facts, names: Iterable[str]) -> str:
    found = {name: compared["final_validation"][name] for name in names if name in compared["final_validation"]}
    seeds = _seeds(found)
    rows = [[NAMES[name], *_row(row, seeds, _loss)] for name, row in found.items()]
    left_out = [f"\nLeft out: {line}." for line in compared["left_out"] if line.split(",")[0] in names]
    return "\n".join([_table(["", *(f"seed {seed}" for seed in seeds), "mean", "s.d."], rows), *left_out])


def _differences(compared: Facts, base: str, names: Iterable[str]) -> str:
    differences = compared[f"difference_to_{base}"]
    found = {name: differences[name] for name in names if name in differences}
    seeds = _seeds(found)
    rows = [[NAMES[name], *_row(row, seeds, _signed)] for name, row in found.items()]
    less = "less the original" if base == "original" else f"less {NAMES[base]}"
    return _table([less, *(f"seed {seed}" for seed in seeds), "mean", "s.d."], rows)


def _seeds(found: Facts) -> list[str]:
    return sorted({seed for row in found.values() for seed in row["by_seed"]}, key=int)


def _row(row: Facts, seeds: Sequence[str], spelled: Callable[[float | None], str]) -> list[str]:
    return [*(spelled(row["by_seed"].get(seed)) for seed in seeds), spelled(row["mean"]), _loss(row["sd"])]


def _by_seed(row: Facts | None, seeds: Sequence[str], spelled: Callable[[float | None], str]) -> list[str]:
    """Spell the values of the seeds and their mean; a row of nothing has none."""
    found: Facts = {"by_seed": {}, "mean": None} if row is None else row
    return [*(spelled(found["by_seed"].get(seed)) for seed in seeds), spelled(found["mean"])]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _number(found: Facts) -> str:
    """Spell a mean over seeds with its spread."""
    sd = "" if found["sd"] is None else f" ± {found['sd']:.2f}"
    return f"{found['mean']:.2f}{sd}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES: dict[str, Callable[[Facts], str]] = {
    table.__name__: table
    for table in (
        setup,
        lr_search,
        losses,
        differences,
        curve,
        read_variants,
        read_variant_differences,
        read_lr,
        embedding_std,
        embedding_std_lr_search,
        throughput,
        retrofit_proof,
        retrofit_losses,
        retrofit_differences,
        retrofit_read_lr,
        dynamics,
        maps,
    )
}
