"""What a rewrite found, planned and proved, as plain facts: records -> dataclasses of str, int, float.

`RewriteReport.to_dict()` is what `--json` prints, and what a saved rewrite keeps in report.json.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from attnres_rewrite.config import AttnResConfig, config_from, describe_config, dtype_name
from attnres_rewrite.records import BlockPlan, Captured, FixedDim, FusedRead, LeftAlone, ReadGroup, counted


@dataclass(frozen=True, slots=True)
class ReadReport:
    """One read: the state it replaces, for whom, and its parameters.

    Attributes:
        state: Number of the state that it replaces; state 0 is the root.
        owner: Name of the module that reads; "" is the model itself.
        source_line: "file.py:12" of the add that made the state.
        num_sources: Sources that it mixes.
        query_name: Of its parameter, "model.layers.3.attn_res.1.query"; its gain is the `key_norm` beside it.
        schedule: "direct" or "two_phase".
        fused_with: Neighbours that run in the same pass: "add", "rms norm", "layer norm".
        left_out: Why a neighbour does not.
    """

    state: int
    owner: str
    source_line: str
    num_sources: int
    query_name: str
    schedule: str
    fused_with: tuple[str, ...]
    left_out: str


@dataclass(frozen=True, slots=True)
class StreamReport:
    """One stream and its plan.

    Attributes:
        name: "stream" when alone, else the deepest module that holds it.
        width: Size of the channel axis, D.
        dtype: Of the last state, as "float32".
        num_updates: Updates found.
        update_kinds: Updates of each kind: "residual", "parallel", "skip", "inject".
        blocks: (first update, last update) of each block, counted from 1.
        reads: In the order of their states.
        groups: Reads that share their finished sources, with the bytes of each schedule.
        runs_as: "Triton kernels", "C++ kernels under torch.compile, else plain PyTorch", or "plain PyTorch (float64)"
            with the reason in parentheses.
    """

    name: str
    width: int
    dtype: str
    num_updates: int
    update_kinds: dict[str, int]
    blocks: tuple[tuple[int, int], ...]
    reads: tuple[ReadReport, ...]
    groups: tuple[ReadGroup, ...]
    runs_as: str

    def __str__(self) -> str:
        """Say it in a line."""
        blocks = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in self.blocks)
        numbers = f"{counted(self.num_updates, 'update')}, {counted(len(self.reads), 'read')}"
        size = f"width {self.width}, {self.dtype}, {numbers}"
        return f"{self.name}: {size}; {counted(len(self.blocks), 'block')} of updates: {blocks}"


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """How the model became a graph.

    Attributes:
        route: How torch.export was called, or that the model came as a graph.
        modes: "eval", "train", or both.
        num_nodes: Of the graph of the model's own mode.
        fixed_dims: Dimensions of inputs that are not free.
        seconds: That the capture took.
        notes: What was not captured, and why.
    """

    route: str
    modes: tuple[str, ...]
    num_nodes: int
    fixed_dims: tuple[FixedDim, ...]
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Proof:
    """One proof in one mode. Errors are relative; a proof passes when no error exceeds the limit.

    Attributes:
        name: "capture" compares the captured graph with the module itself, in the module's dtype; "original" the
            rewritten graph at zero queries, or at zero gates and random queries, with the original graph;
            "original, bias 0" the same with the recency bias left out, because with it they differ; "independent" the
            rewritten graph at random queries with an interpreter that evaluates the formula.
        mode: "train" or "eval".
        dtype: In which it ran, as "float64".
        output_error: The largest of any output.
        gradient_error: The largest of any gradient; None when nothing is differentiable.
        num_outputs: Tensors compared.
        num_gradients: Gradients compared.
        limit: What no error may exceed.
    """

    name: str
    mode: str
    dtype: str
    output_error: float
    gradient_error: float | None
    num_outputs: int
    num_gradients: int
    limit: float

    @property
    def passed(self) -> bool:
        """Whether no error exceeds the limit."""
        # written so that a NaN does not pass
        return self.output_error <= self.limit and (self.gradient_error is None or self.gradient_error <= self.limit)

    def __str__(self) -> str:
        """Say it in a line."""
        gradient = "no gradient" if self.gradient_error is None else f"of gradients {self.gradient_error:.0e}"
        verdict = "proven" if self.passed else "FAILED"
        errors = f"error of outputs {self.output_error:.0e}, {gradient}, limit {self.limit:.0e}"
        return f"{verdict}: {self.name}, {self.mode} mode, {self.dtype}: {errors}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Every proof that was run, and what could not be.

    Attributes:
        proofs: One for each proof and mode.
        notes: What weakens a proof, such as an operation without a float64 kernel.
    """

    proofs: tuple[Proof, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there are proofs and all of them hold."""
        return bool(self.proofs) and all(proof.passed for proof in self.proofs)

    def __str__(self) -> str:
        """Say it in a line for each proof."""
        return "\n".join([*map(str, self.proofs), *(f"note: {note}" for note in self.notes)]) or "no proof was run"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values; each proof has its `passed`."""
        proofs = [asdict(proof) | {"passed": proof.passed} for proof in self.proofs]
        return {"passed": self.passed, "proofs": proofs, "notes": list(self.notes)}


@dataclass(frozen=True, slots=True)
class RewriteReport:
    """Everything a user may ask about one rewrite.

    Attributes:
        model: Name of its class.
        config: The fields of the AttnResConfig.
        capture: How the model became a graph.
        streams: The streams found, with their blocks and reads.
        left_alone: Every other add that was looked at, with the reason.
        num_parameters_added: Numbers in all queries and gains.
        pass_seconds: From find_stream to fuse_reads, all captured modes.
        verify: The proofs; None when none was run.
    """

    model: str
    config: dict[str, Any]
    capture: CaptureReport
    streams: tuple[StreamReport, ...]
    left_alone: tuple[LeftAlone, ...]
    num_parameters_added: int
    pass_seconds: float
    verify: VerifyReport | None = None

    @property
    def reads(self) -> tuple[ReadReport, ...]:
        """The reads of all streams."""
        return tuple(read for stream in self.streams for read in stream.reads)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user must know about the network that comes out."""
        config = config_from(self.config)
        return () if config.starts_as_original else (_BIASED.format(config.recency_bias),)

    def __str__(self) -> str:
        """Say it in a line for each stream, note and proof; `attnres-rewrite inspect` prints the reads as well."""
        added = f"{counted(self.num_parameters_added, 'parameter')} added in {counted(len(self.reads), 'read')}"
        notes = [f"note: {note}" for note in (*self.capture.notes, *self.notes)]
        proofs = "no proof was run" if self.verify is None else str(self.verify)
        left_alone = f"{counted(len(self.left_alone), 'other add')} left alone"
        lines = [*map(str, self.streams), left_alone, *notes, *proofs.split("\n")]
        return "\n  ".join([f"{self.model}: {added}", *lines])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values; `notes` only where there are any."""
        facts = asdict(replace(self, verify=None))
        facts |= {"notes": list(self.notes)} if self.notes else {}
        return facts | {"verify": self.verify.to_dict() if self.verify else None}


_BIASED = (
    "the rewritten network does NOT start as the original: recency_bias={} weighs the newest source of each read from "
    "the first step on; with gate=True, or a bias of 0, it would"
)


def describe_stream(
    plan: BlockPlan,
    groups: Sequence[ReadGroup],
    fused: Sequence[FusedRead],
    kernels: str,
    why_no_kernel: str | None,
    why_no_direct_kernel: str | None = None,
) -> StreamReport:
    """Return the facts of one planned stream; `groups` and `fused` are those of all streams.

    `kernels` names those of the device; `why_no_kernel` is why none of them runs, `why_no_direct_kernel` why none does
    the reads that are direct.
    """
    stream = plan.stream
    names = {read.name for read in plan.reads}
    own = tuple(group for group in groups if names.issuperset(group.reads))
    schedules = {name: group.schedule for group in own for name in group.reads}
    fusions = {fusion.read: fusion for fusion in fused}
    kinds = [update.kind for update in stream.updates]
    return StreamReport(
        name=stream.name,
        width=stream.width,
        dtype=dtype_name(stream.dtype),
        num_updates=len(stream.updates),
        update_kinds={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        blocks=tuple((block.start, block.stop - 1) for block in plan.blocks),
        reads=tuple(
            ReadReport(
                read.state,
                read.owner,
                read.source_line,
                read.num_sources,
                read.query_name,
                schedules[read.name],
                fusions[read.name].neighbours,
                fusions[read.name].reason,
            )
            for read in plan.reads
        ),
        groups=own,
        runs_as=_runs_as({group.schedule for group in own}, kernels, why_no_kernel, why_no_direct_kernel),
    )


def _runs_as(schedules: set[str], kernels: str, why_no_kernel: str | None, why_no_direct_kernel: str | None) -> str:
    if why_no_direct_kernel is not None and schedules == {"direct"}:
        return f"plain PyTorch ({why_no_direct_kernel})"
    if why_no_kernel is not None:
        return f"plain PyTorch ({why_no_kernel})"
    if why_no_direct_kernel is not None and "direct" in schedules:
        return f"{kernels}; in two phases, and plain PyTorch where direct ({why_no_direct_kernel})"
    return kernels


def describe_capture(captured: Captured) -> CaptureReport:
    """Return how the model was captured."""
    program = captured.programs.get(captured.training) or next(iter(captured.programs.values()))
    return CaptureReport(
        route=captured.route,
        modes=tuple("train" if mode else "eval" for mode in sorted(captured.programs)),
        num_nodes=len(program.graph.nodes),
        fixed_dims=captured.fixed_dims,
        seconds=captured.seconds,
        notes=captured.notes,
    )


def report_from(
    model: str,
    config: AttnResConfig,
    captured: Captured,
    streams: Sequence[StreamReport],
    left_alone: Sequence[LeftAlone],
    pass_seconds: float,
) -> RewriteReport:
    """Gather the records of a rewrite; the proofs are added when they have run."""
    added = [sum(config.parameter_sizes(stream.width).values()) * len(stream.reads) for stream in streams]
    return RewriteReport(
        model=model,
        config=describe_config(config),
        capture=describe_capture(captured),
        streams=tuple(streams),
        left_alone=tuple(left_alone),
        num_parameters_added=sum(added),
        pass_seconds=pass_seconds,
    )


def report_from_dict(facts: dict[str, Any]) -> RewriteReport:
    """Return the report that `RewriteReport.to_dict` wrote.

    Raises:
        KeyError: A field is missing.
        TypeError: A field is not known to this release.
    """
    # `notes` follow from the config
    verify = facts["verify"]
    return RewriteReport(
        model=facts["model"],
        config=facts["config"],
        capture=_capture_from_dict(facts["capture"]),
        streams=tuple(_stream_from_dict(stream) for stream in facts["streams"]),
        left_alone=tuple(LeftAlone(**entry) for entry in facts["left_alone"]),
        num_parameters_added=facts["num_parameters_added"],
        pass_seconds=facts["pass_seconds"],
        verify=None if verify is None else _verify_from_dict(verify),
    )


def _capture_from_dict(facts: dict[str, Any]) -> CaptureReport:
    fixed_dims = tuple(FixedDim(**dim) for dim in facts["fixed_dims"])
    lists = {"modes": tuple(facts["modes"]), "fixed_dims": fixed_dims, "notes": tuple(facts["notes"])}
    fields: dict[str, Any] = {**facts, **lists}
    return CaptureReport(**fields)


def _stream_from_dict(facts: dict[str, Any]) -> StreamReport:
    blocks = tuple((first, last) for first, last in facts["blocks"])
    reads = tuple(ReadReport(**read | {"fused_with": tuple(read["fused_with"])}) for read in facts["reads"])
    groups = tuple(ReadGroup(**group | {"reads": tuple(group["reads"])}) for group in facts["groups"])
    fields: dict[str, Any] = {**facts, "blocks": blocks, "reads": reads, "groups": groups}
    return StreamReport(**fields)


def _verify_from_dict(facts: dict[str, Any]) -> VerifyReport:
    proofs = [Proof(**{name: proof[name] for name in proof if name != "passed"}) for proof in facts["proofs"]]
    return VerifyReport(tuple(proofs), tuple(facts["notes"]))
