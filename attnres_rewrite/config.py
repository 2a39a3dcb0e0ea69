"""Every choice of a rewrite and its default, once."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

from attnres_rewrite.kernels.checks import check_variant

OUTPUTS = ("sum", "mean")
SCHEDULES = ("auto", "direct", "two_phase")

Output = Literal["sum", "mean"]
Schedule = Literal["auto", "direct", "two_phase"]


@dataclass(frozen=True, slots=True)
class AttnResConfig:
    """How the updates of a stream are grouped, and how a read mixes its sources.

    At most one of `num_blocks`, `block_size` and `block_layers` may be given. With none of them a
    stream of L updates gets min(8, L) blocks.

    A read mixes S sources src_1 .. src_S [..., D], oldest first. The last four fields are variants of it from follow-up
    work; at their defaults nothing of them is in the result, and the read is that of arXiv 2603.15031:

        key_s   = RMSNorm(src_s) * key_norm                       over D; with key_rank=r of the last r channels, over r
        logit_s = query . key_s                                   with num_heads=H one for each head, see below
        logit_S = logit_S + recency_bias                          of every head
        mix     = sum_s softmax_s(logit)_s * src_s                src_s is not normalised
        result  = S * mix ("sum"), mix ("mean"), or with gate=True   running_sum + gate * mix

    docs/variants.md says what each costs, which path runs it, and when to use it.

    Args:
        num_blocks: Blocks of each stream, as equal as they can be, or "full" for one update a block.
        block_size: Updates a block, the paper's S; the last block may be shorter.
        output: "sum" multiplies the mix by the number of sources: with zero queries a read is exactly
            the running sum. "mean" is the paper to the letter; through a norm both are one function.
        key_norm: Give each read a learned gain [D] on its normalised keys.
        eps: Added to the mean square of a source, in squared units of the stream.
        schedule: "direct" mixes all sources at each read; "two_phase" mixes the finished blocks once for
            all reads of a block; "auto" takes, for each block, what moves fewer bytes.
        param_dtype: Of queries, gains and gates; None means the stream's, but never below float32.
        block_layers: Transformer layers a block (Kimi K3's counting); the last may be shorter.
        num_heads: H heads, each a group of D / H consecutive channels with a softmax of its own (arXiv 2603.15031 tries
            H = 16). Keys are normalised over all D channels, as with one head; the logit of head h is the sum of
            query * key over its channels, and its weights mix its channels of the sources. H must divide D.
        key_rank: r: keys are the last r channels of a source, normalised over those r; query and gain are [r]
            (Sliced keys, arXiv 2607.09694). Values keep all D. Not with several heads: each of those has keys in its
            own channels, which a slice has not, and no source says what the two would be together.
        gate: Add the mix to the running sum of the stream, instead of replacing it: running_sum + gate * mix, where mix
            is the softmax mean (additive routing, arXiv 2605.18855; the gate is ours). The gate is learned and starts
            at zero, so the result starts as the original for any query, in any precision. It is a vector [D], not a
            scalar: at zero queries the mix is parallel to the sum, and norms do not see the length of what they read,
            so neither a scalar gate nor, behind a gate of zero, a query would have a gradient to start from. Queries
            have one from the second step on. With it output="mean" is refused: the sum is in the result.
        recency_bias: Added to the logit of the newest source; fixed, not learned. Weights at zero queries are not
            uniform then, so without a gate the network does NOT start as the original unless it is 0. The report
            says so; the proof against the original is made with the bias at 0.

    Raises:
        ValueError: A field is out of its range, two ways of grouping are given at once, or fields contradict.
        TypeError: A count is not an integer, or another field of a wrong type.
    """

    num_blocks: int | str | None = None
    block_size: int | None = None
    output: Output = "sum"
    key_norm: bool = True
    eps: float = 1e-6
    schedule: Schedule = "auto"
    param_dtype: torch.dtype | None = None
    block_layers: int | None = None
    num_heads: int = 1
    key_rank: int | None = None
    gate: bool = False
    recency_bias: float = 0.0

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
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps={self.eps!r} must be positive and finite: a source may be zero")
        if self.param_dtype is not None and not self.param_dtype.is_floating_point:
            raise ValueError(f"param_dtype={self.param_dtype} is not a floating-point dtype")
        check_variant(self.num_heads, self.key_rank, self.recency_bias)
        _check_gate(self.gate, self.output)
        if self.schedule == "two_phase" and self.only_direct:
            raise ValueError(f"schedule='two_phase' has no form for {self.only_direct}; use 'auto' or 'direct'")

    @property
    def only_direct(self) -> str:
        """The field that keeps reads from being computed in two phases, spelled as it was given; "" when there is none.

        Phase 2 merges by one log-sum-exp for all channels, and makes keys of all of them.
        """
        if self.num_heads > 1:
            return f"num_heads={self.num_heads}"
        return "" if self.key_rank is None else f"key_rank={self.key_rank}"

    @property
    def starts_as_original(self) -> bool:
        """Say whether a read is the running sum, or for "mean" parallel to it, before anything is learned."""
        return self.gate or not self.recency_bias

    def parameter_sizes(self, width: int) -> dict[str, int]:
        """Return the lengths of the parameters of one read of D = `width` channels, by name; all are vectors."""
        key_width = self.key_rank or width
        sizes = {"query": key_width, "key_norm": key_width, "gate": width}
        return {name: size for name, size in sizes.items() if name == "query" or getattr(self, name)}


# what every number of a read's parameters starts as
START_VALUES = {"query": 0.0, "key_norm": 1.0, "gate": 0.0}
_VARIANTS = frozenset(["num_heads", "key_rank", "gate", "recency_bias"])


def describe_config(config: AttnResConfig) -> dict[str, Any]:
    """Return the fields of `config` as JSON-ready values.

    A variant that is not used is left out: what is written without any is what earlier releases wrote and read.
    """
    unused = {field.name for field in fields(config) if getattr(config, field.name) == field.default} & _VARIANTS
    facts = {name: value for name, value in asdict(config).items() if name not in unused}
    dtype = config.param_dtype
    return facts | {"param_dtype": None if dtype is None else dtype_name(dtype)}


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


def _check_gate(gate: object, output: Output) -> None:
    if not isinstance(gate, bool):
        raise TypeError(f"gate={gate!r} must be True or False")
    if gate and output != "sum":
        raise ValueError(
            f"gate=True adds to the running sum, and output={output!r} would leave it out; give one of them"
        )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
