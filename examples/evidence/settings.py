"""What is trained: the presets, the three variants and, of Block, the variants of its read, once."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import attnres_rewrite as ar

VARIANTS = ("original", "block", "full")
# Block with one more field; the values were fixed before the first run, and none was searched
READS: dict[str, dict[str, Any]] = {
    "gate": {"gate": True},
    "num_heads": {"num_heads": 4},
    "key_rank": {"key_rank": 16},
    "recency_bias": {"recency_bias": 2.0},
}
# tried on finished checkpoints alone
RETROFIT_READS = {"gate_and_bias": READS["gate"] | READS["recency_bias"]}


@dataclass(frozen=True, slots=True)
class Preset:
    """A model, its text and its training; sizes in bytes of text, `lr` in units of AdamW's step.

    `lr` was chosen once, for the original alone: the best of those in `docs/evidence.md`.
    """

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int
    warmup: int
    lr: float
    blocks: int
    validate_every: int
    validation_windows: int
    final_windows: int
    retrofit_steps: int
    retrofit_lr: float
    weight_decay: float = 0.1
    clip: float = 1.0
    device: str = "cpu"
    compile: bool = False
    autocast: bool = False

    def facts(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


_TINY = Preset(
    layers=2,
    width=16,
    heads=2,
    context=16,
    batch=4,
    steps=12,
    warmup=4,
    lr=4e-3,
    blocks=2,
    validate_every=4,
    validation_windows=8,
    final_windows=8,
    retrofit_steps=8,
    retrofit_lr=1e-3,
)
_CPU = replace(
    _TINY,
    layers=12,
    width=64,
    heads=4,
    context=128,
    batch=8,
    steps=400,
    warmup=40,
    blocks=8,
    validate_every=50,
    validation_windows=64,
    final_windows=512,
    retrofit_steps=200,
)
# sized by estimate for eight minutes a variant on an H200; it has not been run
_GPU = replace(
    _CPU,
    layers=24,
    width=512,
    heads=8,
    context=512,
    batch=64,
    steps=2000,
    warmup=100,
    lr=1e-3,
    validate_every=100,
    validation_windows=512,
    final_windows=2048,
    retrofit_steps=500,
    retrofit_lr=3e-4,
    device="cuda",
    compile=True,
    autocast=True,
)
PRESETS = {"tiny": _TINY, "cpu": _CPU, "gpu": _GPU}


def config_of(variant: str, preset: Preset) -> ar.AttnResConfig | None:
    """Return how a variant is rewritten; None leaves the model as it is."""
    if variant == "original":
        return None
    return ar.AttnResConfig(num_blocks="full" if variant == "full" else preset.blocks, **fields_of(variant))


def fields_of(variant: str) -> dict[str, Any]:
    """Return the fields of `AttnResConfig` that a variant of the read sets; none for Block and Full."""
    return (READS | RETROFIT_READS).get(variant, {})
