"""What a diagnosis found, as plain facts: dataclasses of str, int and float, and their JSON file.

Letters: T tokens of a stream in the batches that count, D channels, S sources of a read; w[t, s] the weight of source s
at token t; u_k update k, g_k the gradient of the loss by u_k. `baseline_*` are those of the original network, None
where it was not run.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from attnres_rewrite.config import AttnResConfig, config_from, describe_config
from attnres_rewrite.errors import ArtifactError, explain, saying_what_cannot_be_written
from attnres_rewrite.records import counted
from attnres_rewrite.sublayers import SublayerKind

FORMAT, FORMAT_VERSION = "attnres-diagnosis", 2
# 1 has neither config nor loss_kind
READ_VERSIONS = (1, 2)


@dataclass(frozen=True, slots=True)
class ReadDiagnosis:
    """One read: its weights, over all tokens.

    weights[s] = mean_t w[t, s];  spreads[s] = standard deviation over t of w[t, s]
    entropy = mean_t H[t],  H[t] = -sum_s w[t, s] ln w[t, s], in nats: 0 is one source, ln S is all alike
    effective_sources = mean_t exp(H[t])
    mix_rms = sqrt(mean_{t,d} mix[t, d]^2), of what the readers of the state see

    With several heads a read has one row of weights for each, and a token counts once for each.
    """

    name: str  # of its parameters' module, e.g. "model.layers.3.attn_res.1"
    state: int
    owner: str
    before: SublayerKind  # what reads it, where names of modules tell
    sources: tuple[str, ...]  # "embedding", "block 1", ..., and "partial" in an open block
    weights: tuple[float, ...]
    spreads: tuple[float, ...]
    entropy: float
    effective_sources: float
    mix_rms: float


@dataclass(frozen=True, slots=True)
class UpdateDiagnosis:
    """One update.

    output_rms = sqrt(mean_{t,d} u_k[t, d]^2)
    sum_rms      of the partial sum of its block, u_k included; of the baseline, of the running sum x_k
                 (arXiv 2603.15031, figure 5: bounded by the blocks, or growing with depth)
    input_rms    of the newest state that it is computed from: a mix, or the root; None when it reads no state
    gradient_norm = sqrt(mean_t sum_d g_k[t, d]^2), of the loss as it is: the mean of more tokens has a smaller one
    """

    index: int  # k, from 1
    owner: str
    kind: SublayerKind
    block: int  # from 1
    reads: int | None  # the newest state that it is computed from
    output_rms: float
    sum_rms: float
    input_rms: float | None
    gradient_norm: float
    baseline_output_rms: float | None
    baseline_sum_rms: float | None
    baseline_input_rms: float | None
    baseline_gradient_norm: float | None


@dataclass(frozen=True, slots=True)
class StreamDiagnosis:
    """One stream. A block is (first update, last update), counted from 1."""

    name: str
    width: int
    num_tokens: int
    blocks: tuple[tuple[int, int], ...]
    root_rms: float
    baseline_root_rms: float | None
    reads: tuple[ReadDiagnosis, ...]
    updates: tuple[UpdateDiagnosis, ...]

    def __str__(self) -> str:
        """Say the ranges of its figures in a line."""
        effective = _range([read.effective_sources for read in self.reads])
        rms = _range([update.output_rms for update in self.updates])
        gradients = _range([update.gradient_norm for update in self.updates])
        mixed = f"{counted(len(self.reads), 'read')} of {effective} effective sources"
        return f"{self.name}: {mixed}, {counted(len(self.updates), 'update')} of rms {rms}, gradient norms {gradients}"


def _range(figures: Sequence[float]) -> str:
    return f"{min(figures):.3g} to {max(figures):.3g}" if figures else "no"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A rewritten network on some batches, beside the original where one was run.

    loss: mean over the finite batches, each counted once; None, and no streams, when no batch was finite.
    config, loss_kind: of the network and of the loss; None and "" in a file of format 1, which does not say.
    """

    model: str
    mode: str  # "train" or "eval"
    num_batches: int  # that were run
    num_nonfinite: int  # of them, where a loss or a figure was not finite: they are in no mean
    nonfinite_batches: tuple[int, ...]  # the first of those, counted from 0, at most MAX_LISTED
    loss: float | None
    baseline: str  # "" none, "own" the original with this network's parameters, "given" with other values
    baseline_loss: float | None
    streams: tuple[StreamDiagnosis, ...]
    config: AttnResConfig | None = None
    loss_kind: str = ""  # "given" by a loss_fn, "default" the outputs' own or the next-token cross-entropy

    @property
    def num_tokens(self) -> int:
        """Tokens of all streams in the finite batches."""
        return sum(stream.num_tokens for stream in self.streams)

    def __str__(self) -> str:
        """Say it in a line for each stream; `attnres-rewrite diagnose` prints tables."""
        loss = "no finite loss" if self.loss is None else f"loss {self.loss:.4f}"
        original = "" if self.baseline_loss is None else f", of the original {self.baseline_loss:.4f}"
        batches = "1 batch" if self.num_batches == 1 else f"{self.num_batches} batches"
        head = f"{self.model}: {self.mode} mode, {batches}, {counted(self.num_tokens, 'token')}; {loss}{original}"
        return "\n  ".join([head, *map(str, self.streams)])

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as JSON-ready values, with its format and version."""
        header = {"format": FORMAT, "format_version": FORMAT_VERSION}
        config = None if self.config is None else describe_config(self.config)
        facts = asdict(replace(self, config=None), dict_factory=_with_lists)
        return header | facts | {"config": config, "num_tokens": self.num_tokens}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "Diagnosis":
        """Return the diagnosis that `to_dict` wrote.

        Raises:
            ArtifactError: It is none, or of another version.
        """
        return _from_dict(facts, "the values given")

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write a JSON file; one that is there is replaced with `force` only.

        Raises:
            ArtifactError: The file exists, or cannot be written.
        """
        target = Path(path)
        if target.exists() and not force:
            raise ArtifactError(explain("the file exists", str(target), "", "Give another name, or force=True."))
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        with saying_what_cannot_be_written("the file", target):
            target.write_text(text)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Diagnosis":
        """Read what `save` wrote, in this release or in one with format 1.

        Raises:
            ArtifactError: The file is no diagnosis, is damaged, or is of another version.
        """
        try:
            facts = json.loads(Path(path).read_text(), parse_constant=_refuse_constant)
        except (OSError, ValueError) as why:
            raise ArtifactError(explain("not a diagnosis", str(path), str(why), "Write one with save().")) from why
        return _from_dict(facts, str(path))


MAX_LISTED = 100


def _with_lists(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Write tuples as JSON does, so that facts in memory equal facts from a file."""
    return {name: _listed(value) for name, value in fields}


def _listed(value: Any) -> Any:
    return [_listed(entry) for entry in value] if isinstance(value, tuple) else value


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON, and no figure of a diagnosis")


def _from_dict(facts: Any, where: str) -> Diagnosis:
    if not isinstance(facts, Mapping) or facts.get("format") != FORMAT:
        raise ArtifactError(explain("not a diagnosis", where, f'It does not say "format": "{FORMAT}".'))
    if facts.get("format_version") not in READ_VERSIONS:
        raise ArtifactError(
            explain(
                f"the diagnosis has format {facts.get('format_version')}; this release reads "
                + " and ".join(map(str, READ_VERSIONS)),
                where,
                remedy="Use the release that wrote it, or diagnose again.",
            )
        )
    try:
        return _diagnosis(facts)
    except (KeyError, TypeError, ValueError, AttributeError) as why:
        raise ArtifactError(
            explain("the diagnosis cannot be read", where, f"{type(why).__name__}: {why}", "Diagnose again.")
        ) from why


def _diagnosis(facts: Mapping[str, Any]) -> Diagnosis:
    streams = tuple(_stream(stream) for stream in facts["streams"])
    fields: dict[str, Any] = {name: value for name, value in facts.items() if name not in _NOT_FIELDS}
    fields |= {"streams": streams, "nonfinite_batches": tuple(facts["nonfinite_batches"])}
    if (config := facts.get("config")) is not None:
        fields["config"] = config_from(config)
    return Diagnosis(**fields)


_NOT_FIELDS = frozenset({"format", "format_version", "num_tokens"})


def _stream(facts: Mapping[str, Any]) -> StreamDiagnosis:
    blocks = tuple((first, last) for first, last in facts["blocks"])
    reads = tuple(_read(read) for read in facts["reads"])
    updates = tuple(UpdateDiagnosis(**update) for update in facts["updates"])
    fields: dict[str, Any] = {**facts, "blocks": blocks, "reads": reads, "updates": updates}
    return StreamDiagnosis(**fields)


def _read(facts: Mapping[str, Any]) -> ReadDiagnosis:
    weights, spreads = (tuple(map(float, facts[name])) for name in ("weights", "spreads"))
    sources = tuple(facts["sources"])
    if not len(sources) == len(weights) == len(spreads):
        raise ValueError(f"{facts['name']} has {len(sources)} sources, {len(weights)} weights, {len(spreads)} spreads")
    fields: dict[str, Any] = {**facts, "sources": sources, "weights": weights, "spreads": spreads}
    return ReadDiagnosis(**fields)
