"""What a generated network looks like: NetworkSpec, a frozen record of small printable choices.

random_spec(seed) -> NetworkSpec          draws one, deterministic
why_not(spec) -> Conflict | None          two choices that do not go together
repair(spec) -> NetworkSpec               resets conflicting fields to their simplest value

The default of every field is its simplest value, so that shrink knows where to go, and repr shows
only the fields that differ from it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

STREAM_IN_PLACE = ("x += f", "x.add_(f)")
UNET = ("unet", "unet_scaled", "unet_projected")

# The simplest value comes first; it is the default of the field.
CHOICES: dict[str, tuple[Any, ...]] = {
    "topology": ("single", "encoder_decoder", "two_towers"),
    "layers": (2, 3, 4, 5, 6, 7, 8),
    "loops": (1, 2),
    "width": tuple(range(8, 49)),
    "heads": (1, 2, 3, 4),
    "head_dim": (4, 6),
    "batch": (2, 1, 3),
    "length": (4, 3, 5, 6, 7, 8),
    "source": ("tokens", "features", "image"),
    "position": ("none", "learned", "sinusoidal", "parameter"),
    "embed_scale": (False, True),
    "embed_norm": (False, True),
    "embed_dropout": (False, True),
    "class_token": (False, True),
    "layout": ("btc", "flat", "tbc", "grid", "channels_first"),
    "residual": ("sequential", "single", "(x + attn) + mlp", "(attn + mlp) + x", "x + (attn + mlp)"),
    "shared_norm": (False, True),
    "norm": (
        "layer",
        "layer_no_bias",
        "layer_plain",
        "rms",
        "rms_hf",
        "rms_gemma",
        "rms_plain",
        "rms_sqrt",
    ),
    "norm_place": ("pre", "sandwich", "branch_output"),
    "scores": ("sdpa", "sdpa_causal", "mask", "alibi", "relative"),
    "rotary": (False, True),
    "layer_scale": (False, True),
    "drop": ("none", "dropout", "drop_path", "attention"),
    "scaling": ("none", "branch", "both"),
    "layer_scalar": ("none", "x * s", "x *= s"),
    "casts": ("none", "x.to(float32)", "x.float()"),
    "inject": ("none", "front", "middle", "every", "tail"),
    "inject_shape": ("token", "batch", "vector"),
    "skip": ("none", *UNET, "root"),
    "reader": ("none", "aux", "collect"),
    "final_norm": (True, False),
    "pool": ("none", "mean", "first", "first_before_norm"),
    "head": ("linear", "tied", "none"),
    "output": ("tensor", "tuple", "dict", "dataclass"),
    "loss": (False, True),
}
# Fields whose value is a tuple of these; layers take its entries in turn.
CYCLES: dict[str, tuple[str, ...]] = {
    "mixers": ("softmax", "scan", "delta"),
    "mlps": ("relu", "gelu_hand", "swiglu", "gated", "moe_dense", "moe_loop", "nested"),
    "spellings": (
        "x + f",
        "f + x",
        "torch.add(x, f)",
        "torch.add(x, f, alpha)",
        "torch.add(f, x, alpha)",
        "x += f",
        "x.add_(f)",
        "f += x",
    ),
}


@dataclass(frozen=True, slots=True, repr=False)
class NetworkSpec:
    """One network: `build` makes it, with weights drawn from `seed`."""

    seed: int = 0
    topology: str = "single"
    layers: int = 2
    loops: int = 1  # passes over the same layers
    width: int = 8
    heads: int = 1
    head_dim: int = 4
    batch: int = 2
    length: int = 4
    source: str = "tokens"
    position: str = "none"
    embed_scale: bool = False
    embed_norm: bool = False
    embed_dropout: bool = False
    class_token: bool = False
    layout: str = "btc"
    residual: str = "sequential"
    shared_norm: bool = False
    norm: str = "layer"
    norm_place: str = "pre"
    scores: str = "sdpa"
    rotary: bool = False
    layer_scale: bool = False
    drop: str = "none"
    scaling: str = "none"
    layer_scalar: str = "none"
    casts: str = "none"
    inject: str = "none"
    inject_shape: str = "token"
    skip: str = "none"
    reader: str = "none"
    final_norm: bool = True
    pool: str = "none"
    head: str = "linear"
    output: str = "tensor"
    loss: bool = False
    mixers: tuple[str, ...] = ("softmax",)
    mlps: tuple[str, ...] = ("relu",)
    spellings: tuple[str, ...] = ("x + f",)

    def __repr__(self) -> str:
        shown = [f"{name}={value!r}" for name, value in changed_fields(self).items()]
        return f"NetworkSpec({', '.join([f'seed={self.seed}', *shown])})"


@dataclass(frozen=True, slots=True)
class Conflict:
    """Why two choices do not go together, and the field to reset."""

    reason: str
    field: str


def changed_fields(spec: NetworkSpec) -> dict[str, Any]:
    """Return the fields that are not at their simplest value; the seed is not a choice."""
    values = {f.name: (getattr(spec, f.name), f.default) for f in fields(spec) if f.name != "seed"}
    return {name: value for name, (value, default) in values.items() if value != default}


def default_of(name: str) -> Any:
    """Return the simplest value of the field `name`."""
    return next(f.default for f in fields(NetworkSpec) if f.name == name)


def mixes_in_place(spec: NetworkSpec) -> bool:
    """Say whether an add overwrites the tensor of the state it is added to."""
    return any(spelling in STREAM_IN_PLACE for spelling in spec.spellings)


_RULES: tuple[tuple[str, str, Callable[[NetworkSpec], bool]], ...] = (
    (
        "decoder layers have three sub-layers in sequence",
        "residual",
        lambda s: s.topology == "encoder_decoder" and s.residual != "sequential",
    ),
    (
        "windows are cut from an image, without a decoder",
        "layout",
        lambda s: s.layout == "grid" and (s.source != "image" or s.topology == "encoder_decoder"),
    ),
    ("2 x 2 windows", "length", lambda s: s.layout == "grid" and s.length % 4 != 0),
    ("two rows of patches", "length", lambda s: s.source == "image" and s.length % 2 != 0),
    ("a grid holds patches only", "class_token", lambda s: s.layout == "grid" and s.class_token),
    ("a grid has no first token", "pool", lambda s: s.layout == "grid" and s.pool.startswith("first")),
    (
        "only parallel branches can share a norm",
        "shared_norm",
        lambda s: s.shared_norm and s.residual in ("sequential", "single"),
    ),
    (
        "without a norm in front there is none to share",
        "shared_norm",
        lambda s: s.shared_norm and s.norm_place == "branch_output",
    ),
    # the inner adds of such a branch would start at the very state of the outer stream
    (
        "a residual sub-network needs a norm in front",
        "mlps",
        lambda s: "nested" in s.mlps and s.norm_place == "branch_output",
    ),
    ("only softmax attention is rotated", "rotary", lambda s: s.rotary and "softmax" not in s.mixers),
    (
        "only softmax attention has scores",
        "scores",
        lambda s: s.scores != "sdpa" and "softmax" not in s.mixers,
    ),
    (
        "only fused attention has a dropout of its own",
        "drop",
        lambda s: s.drop == "attention" and ("softmax" not in s.mixers or not s.scores.startswith("sdpa")),
    ),
    ("the shape of nothing", "inject_shape", lambda s: s.inject == "none" and s.inject_shape != "token"),
    ("a skip pairs layers of one pass", "loops", lambda s: s.loops > 1 and s.skip in UNET),
    # each step of a recurrence is some ten nodes, and the export of a thousand takes a second
    ("recurrences are short", "length", lambda s: s.length > 4 and set(s.mixers) != {"softmax"}),
    # each takes states out of the chain that find_stream asks for; a small network has few to spare
    (
        "raw reader and skip in a shallow network",
        "reader",
        lambda s: s.reader == "aux" and s.skip != "none" and s.layers < 4,
    ),
    # an in-place add would overwrite the state that somebody keeps
    (
        "in-place adds overwrite the kept state",
        "spellings",
        lambda s: mixes_in_place(s) and (s.skip != "none" or s.reader != "none"),
    ),
    (
        "a tied head needs a vocabulary",
        "head",
        lambda s: s.head == "tied" and (s.source != "tokens" or s.topology == "two_towers"),
    ),
    (
        "one tensor cannot carry hidden states",
        "output",
        lambda s: s.output == "tensor" and s.reader != "none",
    ),
)


def why_not(spec: NetworkSpec) -> Conflict | None:
    """Return the first pair of choices that do not go together."""
    return next((Conflict(reason, name) for reason, name, holds in _RULES if holds(spec)), None)


def repair(spec: NetworkSpec) -> NetworkSpec:
    """Reset the fields that conflict, one after the other, to their simplest value."""
    while (conflict := why_not(spec)) is not None:
        if conflict.field == "output" and spec.reader != "none":
            # the simplest output is what conflicts here
            spec = replace(spec, output="tuple")
        else:
            spec = replace(spec, **{conflict.field: default_of(conflict.field)})
    return spec


def random_spec(seed: int) -> NetworkSpec:
    """Draw a network: each feature is at its simplest value about every second time."""
    draw = random.Random(seed)
    values: dict[str, Any] = {name: _draw_choice(draw, name) for name in CHOICES}
    values |= {name: _draw_cycle(draw, name) for name in CYCLES}
    if values["source"] == "image":
        values["length"] = draw.choice((4, 6, 8))
        if draw.random() < 0.5:
            values |= {"layout": "grid", "length": draw.choice((4, 8))}
    spec = repair(NetworkSpec(seed=seed, **values))
    if draw.random() < 0.05:
        return repair(replace(spec, layers=draw.choice((6, 7, 8)), loops=1, topology="single"))
    return repair(replace(spec, layers=min(spec.layers, _affordable_layers(spec))))


def _affordable_layers(spec: NetworkSpec) -> int:
    """Return the depth at which the graph has some 320 nodes, half a second of export."""
    mixer = sum(15 + 10 * spec.rotary if kind == "softmax" else 45 for kind in spec.mixers) / len(spec.mixers)
    mlp = sum(30 if kind in ("moe_dense", "moe_loop", "nested") else 10 for kind in spec.mlps) / len(spec.mlps)
    norm = 20 if spec.norm.startswith("rms_") else 2
    per_layer = mixer + mlp + norm * (1 + (spec.norm_place == "sandwich")) + 10
    stacks = 1 if spec.topology == "single" else 2
    return max(2, int(320 / (per_layer * stacks * spec.loops)))


def _draw_choice(draw: random.Random, name: str) -> Any:
    simplest, *others = CHOICES[name]
    if name in ("width", "heads", "head_dim", "batch", "length", "norm", "residual"):
        return draw.choice(CHOICES[name])
    if name == "layers":
        # deep networks are slow to export and find little that shallow ones do not
        return draw.choices(CHOICES[name], weights=(8, 8, 6, 3, 2, 1, 1))[0]
    chance = 0.25 if name in ("topology", "loops", "final_norm", "reader", "skip") else 0.45
    return draw.choice(others) if draw.random() < chance else simplest


def _draw_cycle(draw: random.Random, name: str) -> tuple[str, ...]:
    values = CYCLES[name]
    # recurrences are the slowest to export
    weights = [3 if value == "softmax" else 1 for value in values]
    return tuple(draw.choices(values, weights, k=draw.choice((1, 2, 3))))
