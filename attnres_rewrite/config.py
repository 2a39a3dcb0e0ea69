"""Every choice of a rewrite and its default, once."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

OUTPUTS = ("sum", "mean")
SCHEDULES = ("auto", "direct", "two_phase")

Output = Literal["sum", "mean"]
Schedule = Literal["auto", "direct", "two_phase"]


@dataclass(frozen=True, slots=True)
class AttnResConfig:
    """How the updates of a stream are grouped, and how a read mixes its sources.

    At most one of `num_blocks`, `block_size` and `block_layers` may be given. With none of them a
    stream of L updates gets min(8, L) blocks.

    Args:
        num_blocks: Blocks of each stream, as equal as they can be, or "full" for one update a block.
        block_size: Updates a block, the paper's S; the last block may be shorter.
        output: "sum" multiplies the mix by the number of sources: with zero queries a read is exactly
            the running sum. "mean" is the paper to the letter; through a norm both are one function.
        key_norm: Give each read a learned gain [D] on its normalised keys.
        eps: Added to the mean square of a source, in squared units of the stream.
        schedule: "direct" mixes all sources at each read; "two_phase" mixes the finished blocks once for
            all reads of a block; "auto" takes, for each block, what moves fewer bytes.
        param_dtype: Of queries and gains; None means the stream's, but never below float32.
        block_layers: Transformer layers a block (Kimi K3's counting); the last may be shorter.

    Raises:
        ValueError: A field is out of its range, or two ways of grouping are given at once.
        TypeError: A count is not an integer.
    """

    num_blocks: int | str | None = None
    block_size: int | None = None
    output: Output = "sum"
    key_norm: bool = True
    eps: float = 1e-6
    schedule: Schedule = "auto"
    param_dtype: torch.dtype | None = None
    block_layers: int | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("num_blocks", "block_size", "block_layers")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            spelled = " and ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(f"{spelled} both group the updates; give one of them")
        for name, value in given.items():
            _check_count(name, value)
        _check_choice("output", self.output, OUTPUTS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        if not self.eps > 0:
            raise ValueError(f"eps={self.eps!r} must be positive: a source may be zero")
        if self.param_dtype is not None and not self.param_dtype.is_floating_point:
            raise ValueError(f"param_dtype={self.param_dtype} is not a floating-point dtype")


def describe_config(config: AttnResConfig) -> dict[str, Any]:
    """Return the fields of `config` as JSON-ready values."""
    dtype = config.param_dtype
    return asdict(config) | {"param_dtype": None if dtype is None else dtype_name(dtype)}


def config_from(facts: Mapping[str, Any]) -> AttnResConfig:
    """Return the config that `describe_config` described.

    Raises:
        TypeError: A field has a name that AttnResConfig does not know.
    """
    dtype = facts.get("param_dtype")
    fields: dict[str, Any] = {**facts, "param_dtype": None if dtype is None else getattr(torch, dtype)}
    return AttnResConfig(**fields)


def check_config(config: object) -> None:
    """Raise TypeError for what is no AttnResConfig; callers are not all type-checked."""
    if not isinstance(config, AttnResConfig):
        count = config if isinstance(config, int) else 8
        raise TypeError(f"config={config!r} must be an AttnResConfig: config=AttnResConfig(num_blocks={count})")


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as torch's attribute is named: "float32"."""
    return str(dtype).removeprefix("torch.")


def _check_count(name: str, value: object) -> None:
    if name == "num_blocks" and isinstance(value, str):
        if value != "full":
            raise ValueError(f'num_blocks={value!r} must be a count or "full"')
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an integer")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
