"""What a rewrite costs in memory and time: a report, and the graph where there is one -> Forecast. Nothing is measured.

Bytes are those of passes/schedule_reads.py: rows of D that a token moves in one training step, forward and backward.
Time is the roofline of pipeline/costs.py.
"""

from dataclasses import dataclass

import torch
from torch import fx

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.fxgraph import num_bytes_of, shape_of, tensor_of
from attnres_rewrite.module import Program, RewrittenModule
from attnres_rewrite.pipeline.costs import Device, flops_of, seconds_of_many_tokens
from attnres_rewrite.records import ReadGroup
from attnres_rewrite.report import RewriteReport, StreamReport

# of each merge: its add moves three rows, the norm behind it two, and its backward three; the original has them, too
ORIGINAL_ROWS_A_MERGE = 8
# with a gate: the add of the running sum moves three rows at each update, and the backward adds up the two gradients of
# what is added, three; at each read product and add move three in one pass, their backward three, and three to add up
# the gradients of the running sum
GATE_ROWS_AN_UPDATE, GATE_ROWS_A_READ = 6, 9
# a backward costs about twice a forward
STEP_TO_FORWARD = 3


@dataclass(frozen=True, slots=True)
class StreamForecast:
    """Bytes of one stream, of one token."""

    name: str
    row_bytes: int
    num_rows: int  # that the last read mixes: the root and all blocks
    moved_bytes: int  # by reads and gates, and by the adds and norms beside merges, in one training step
    original_bytes: int  # of these, what the original's own adds and norms move

    @property
    def bank_bytes(self) -> int:
        return self.row_bytes * self.num_rows

    @property
    def extra_bytes(self) -> int:
        return self.moved_bytes - self.original_bytes


@dataclass(frozen=True, slots=True)
class StepForecast:
    """One training step of the original, a token of its first stream, counted on the example inputs."""

    stream_tokens: tuple[int, ...]  # of the example inputs: an encoder and a decoder may have different numbers
    flops: float
    arithmetic_ns: float  # as if everything but matrix products, convolutions and attention were fused away
    roofline_ns: float  # as if nothing were fused
    num_uncounted: int  # operations whose sizes depend on the data, such as the tokens of an expert

    @property
    def num_tokens(self) -> int:
        return self.stream_tokens[0]


@dataclass(frozen=True, slots=True)
class Forecast:
    """Memory and time of a rewrite; `step` is None where the sizes of the graph are not known."""

    num_parameters: int
    parameter_bytes: int
    streams: tuple[StreamForecast, ...]
    device: Device
    step: StepForecast | None

    @property
    def bank_bytes(self) -> int:
        return sum(stream.bank_bytes for stream in self.streams)

    @property
    def extra_bytes(self) -> int:
        return sum(stream.extra_bytes for stream in self.streams)

    @property
    def extra_ns(self) -> float:
        return 1e9 * self.extra_bytes / self.device.bytes_per_s

    @property
    def ratios(self) -> tuple[float, float] | None:
        """Time of a step of the rewritten model over that of the original: nothing of it fused, and all.

        None where the graph has no matrix product, or its sizes are not known.
        """
        if self.step is None or not self.step.arithmetic_ns:
            return None
        tokens = self.step.stream_tokens
        moved = sum(stream.extra_bytes * count for stream, count in zip(self.streams, tokens, strict=True))
        extra_ns = 1e9 * moved / tokens[0] / self.device.bytes_per_s
        return 1 + extra_ns / self.step.roofline_ns, 1 + extra_ns / self.step.arithmetic_ns


def forecast(report: RewriteReport, model: RewrittenModule | None) -> Forecast:
    """Work out what the reads of a report add."""
    device = Device()
    has_gate = report.config.get("gate", False)
    config = AttnResConfig(key_norm=report.config["key_norm"], key_rank=report.config.get("key_rank"), gate=has_gate)
    parameter_bytes = sum(
        sum(config.parameter_sizes(stream.width).values())
        * len(stream.reads)
        * _parameter_dtype(report, stream).itemsize
        for stream in report.streams
    )
    return Forecast(
        num_parameters=report.num_parameters_added,
        parameter_bytes=parameter_bytes,
        streams=tuple(_of_stream(stream, has_gate) for stream in report.streams),
        device=device,
        step=None if model is None else _step(model.programs[model.training], device),
    )


def _parameter_dtype(report: RewriteReport, stream: StreamReport) -> torch.dtype:
    """Return the dtype of what is added: that of the config, or the stream's, but never below float32."""
    chosen = report.config["param_dtype"]
    return getattr(torch, chosen) if chosen else torch.promote_types(getattr(torch, stream.dtype), torch.float32)


def _of_stream(stream: StreamReport, has_gate: bool) -> StreamForecast:
    row_bytes = stream.width * getattr(torch, stream.dtype).itemsize
    gate_rows = GATE_ROWS_AN_UPDATE * stream.num_updates + GATE_ROWS_A_READ * len(stream.reads)
    return StreamForecast(
        name=stream.name,
        row_bytes=row_bytes,
        num_rows=1 + len(stream.blocks),
        moved_bytes=sum(chosen_bytes(group) for group in stream.groups) + has_gate * row_bytes * gate_rows,
        original_bytes=sum(ORIGINAL_ROWS_A_MERGE * row_bytes * group.num_merges for group in stream.groups),
    )


def chosen_bytes(group: ReadGroup) -> int:
    """Return the bytes of a group under the schedule it has."""
    return group.two_phase_bytes if group.schedule == "two_phase" else group.direct_bytes


def _step(program: Program, device: Device) -> StepForecast | None:
    streams = [plan.stream for plan in program.plans]
    # a saved rewrite keeps no sizes
    if any(tensor_of(stream.root) is None for stream in streams):
        return None
    nodes = [node for node in program.original.nodes if _has_known_sizes(node)]
    stream_tokens = tuple(_num_elements(stream.root) // stream.width for stream in streams)
    num_tokens = stream_tokens[0]
    flops = STEP_TO_FORWARD * sum(map(flops_of, nodes)) / num_tokens
    seconds = STEP_TO_FORWARD * sum(seconds_of_many_tokens(node, device) for node in nodes) / num_tokens
    num_uncounted = len(program.original.nodes) - len(nodes)
    return StepForecast(stream_tokens, flops, 1e9 * flops / device.flops_per_s, 1e9 * seconds, num_uncounted)


def _num_elements(node: fx.Node) -> int:
    value = tensor_of(node)
    assert value is not None
    return num_bytes_of(node) // value.element_size()


def _has_known_sizes(node: fx.Node) -> bool:
    return all(isinstance(size, int) for value in (node, *node.all_input_nodes) for size in shape_of(value) or ())
