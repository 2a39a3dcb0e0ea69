"""partition(): a rewritten model -> the stages of a pipeline, and what it will send, before anything runs."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.node import map_aggregate

from attnres_rewrite.errors import PartitionError, explain
from attnres_rewrite.example_values import unscheduled_graph
from attnres_rewrite.fxgraph import module_path, op_name, shape_of
from attnres_rewrite.module import RewrittenModule, require_rewritten
from attnres_rewrite.passes.fuse_reads import fuse_reads
from attnres_rewrite.passes.key_draws import KEY, key_draws
from attnres_rewrite.passes.partition import StageGraph
from attnres_rewrite.passes.partition import partition as cut_graph
from attnres_rewrite.passes.relax_checks import relax_checks
from attnres_rewrite.passes.schedule_reads import schedule_reads
from attnres_rewrite.pipeline.costs import Device, flops_of, seconds_of
from attnres_rewrite.pipeline.cuts import Candidate, balanced_cuts, candidates, named_cuts, source_labels
from attnres_rewrite.pipeline.planner import (
    MODES,
    Mode,
    Placement,
    StageRoutes,
    Traffic,
    Value,
    plan_routes,
    ranks_of_stages,
    traffic_of,
)
from attnres_rewrite.records import counted

Dropout = Literal["keyed", "torch"]


@dataclass(frozen=True, slots=True)
class StageFacts:
    """One stage of a plan, for reading.

    Attributes:
        stage: Its number, counted from 0.
        rank: The process that runs it.
        modules: Numbered layers in it, and modules that are in no layer.
        num_parameters: Numbers in its parameters.
        flops: Forward, of one microbatch.
        seconds: Forward, estimated (pipeline/costs.py).
        inputs: Inputs of the model that it takes.
        receives: Values that come from the stage before.
        reads_from_store: Values that its rank has kept.
        sends: Values that go to the next stage.
        recomputed: Nodes that another stage computes, too.
    """

    stage: int
    rank: int
    modules: tuple[str, ...]
    num_parameters: int
    flops: int
    seconds: float
    inputs: tuple[str, ...]
    receives: tuple[str, ...]
    reads_from_store: tuple[str, ...]
    sends: tuple[str, ...]
    recomputed: int

    def __str__(self) -> str:
        """Say it in a line."""
        size = f"{counted(self.num_parameters, 'parameter')}, {self.flops / 1e9:,.3f} GFLOPs, sends {len(self.sends)}"
        return f"stage {self.stage} on rank {self.rank}: {size}: {', '.join(self.modules)}"


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """Where a rewritten model is cut, what each stage does, and the traffic of each mode; `stages` can be run.

    Attributes:
        num_ranks: Processes, P.
        num_virtual: Stages of each process, V.
        placement: "loop" or "v".
        mode: What ranks keep when it runs: "exact", "paper" or "naive".
        dropout: "keyed" or "torch".
        cuts: The reads that begin stages 1 to P * V - 1.
        model_hash: Of the rewritten graph with its sizes; a plan is for this one.
        stages: The P * V pieces; `stages[i].module` is a GraphModule with its share of the parameters.
        values: What crosses a cut, in the order of the wire.
        routes: What each stage takes, sends and keeps.
        facts: The same for reading, with sizes and estimated times.
        traffic: What is sent under each mode.
        num_blocks: Of all streams; the embeddings, which cross as well, are not counted.
        tied: Parameters that several stages use, and those stages.
        aliases: Other names that the state dict of the model has for a parameter or a buffer.
    """

    num_ranks: int
    num_virtual: int
    placement: Placement
    mode: Mode
    dropout: Dropout
    cuts: tuple[str, ...]
    model_hash: str
    stages: tuple[StageGraph, ...]
    values: tuple[Value, ...]
    routes: tuple[StageRoutes, ...]
    facts: tuple[StageFacts, ...]
    traffic: Mapping[Mode, Traffic]
    num_blocks: int
    tied: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, tuple[str, ...]]

    @property
    def balance(self) -> float:
        """Seconds of the slowest stage, divided by the mean; 1 is perfect."""
        seconds = [fact.seconds for fact in self.facts]
        return max(seconds) * len(seconds) / sum(seconds) if sum(seconds) else math.nan

    def formulas(self) -> dict[Mode, float]:
        """Return the units of each mode where every stage makes equally many blocks (arXiv 2603.15031, section 4.2)."""
        p, v = self.num_ranks, self.num_virtual
        per_stage = self.num_blocks / (p * v)
        closed = {"naive": p * v * (p * v - 1) / 2, "paper": p * (p - 1) / 2 + (v - 1) * p * p}
        return {
            "naive": closed["naive"] * per_stage,
            "paper": closed["paper"] * per_stage,
            "exact": p * (p - 1) * (2 * v - 1) / 2 * per_stage,
        }

    def __str__(self) -> str:
        """Say it in a line for each stage, and the traffic; `attnres-rewrite partition` prints tables."""
        each = counted(self.num_virtual, "stage") + (" each" if self.num_ranks > 1 else "")
        shape = f"{counted(self.num_ranks, 'rank')} with {each}, placed as a {self.placement}"
        traffic = (
            f"{counted(of.total_units, 'tensor')} a microbatch with mode={mode!r}" for mode, of in self.traffic.items()
        )
        lines = [f"slowest stage {self.balance:.2f} of the mean", *map(str, self.facts), *traffic]
        return "\n  ".join([f"{shape}; mode={self.mode!r}", *lines])

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values. A unit is one carried tensor of a microbatch, forward."""
        formulas = self.formulas()
        traffic = {
            mode: {
                "total_units": of.total_units,
                "per_hop_units": list(of.per_hop_units),
                "total_bytes": of.total_bytes,
                "per_hop_bytes": list(of.per_hop_bytes),
                "held_bytes": list(of.held_bytes),
                "formula_units": formulas[mode],
            }
            for mode, of in self.traffic.items()
        }
        return {
            "model_hash": self.model_hash,
            "num_ranks": self.num_ranks,
            "num_virtual": self.num_virtual,
            "placement": self.placement,
            "mode": self.mode,
            "dropout": self.dropout,
            "cuts": list(self.cuts),
            "num_blocks": self.num_blocks,
            "balance": self.balance,
            "stages": [asdict(fact) for fact in self.facts],
            "traffic": traffic,
            "tied": {name: list(stages) for name, stages in self.tied.items()},
        }


def partition(
    new: RewrittenModule,
    num_ranks: int,
    num_virtual: int = 1,
    *,
    cuts: Literal["balanced", "blocks"] | Sequence[str] = "balanced",
    placement: Placement = "loop",
    mode: Mode = "exact",
    dropout: Dropout = "keyed",
    device: Device | None = None,
) -> PipelinePlan:
    """Cut a rewritten model into `num_ranks` times `num_virtual` pipeline stages, and plan what they exchange.

    The model is not changed; the stages use its parameters. Sizes are those of its example inputs: one microbatch.

    Args:
        new: The result of `rewrite` or `load`, in the mode it is to run in. It may be on the meta device.
        num_ranks: Processes, P.
        num_virtual: Stages of each process, V.
        cuts: "balanced" makes the slowest stage as fast as can be; "blocks" does so with cuts at ends of blocks only,
            where no partial sum crosses; or the names of the modules, or of the reads (model.layers.3.attn_res.1),
            that begin stages 1 to P * V - 1.
        placement: "loop" puts stage c on rank c mod P, "v" turns back at the ends.
        mode: What ranks keep: "exact", "paper" or "naive"; see pipeline/planner.py.
        dropout: "keyed" draws every random number from a key of the step and the microbatch, so that all partitions
            of a model drop the same; "torch" leaves each rank to the generator of its device.
        device: Speeds for the estimate of each stage's time.

    Raises:
        PartitionError: The model cannot be cut so, with the reason.
        ValueError: A count, a placement, a mode, the number of names or `dropout` is wrong.
        TypeError: `new` is not rewritten.
    """
    require_rewritten(new, "partition")
    if dropout not in ("keyed", "torch"):
        raise ValueError(f"dropout={dropout!r} must be 'keyed' or 'torch'")
    ranks = ranks_of_stages(num_ranks, num_virtual, placement)
    graph, device = unscheduled_graph(new), device or Device()
    model_hash = hash_of(graph)
    if dropout == "keyed":
        key_draws(graph, new)
    places, last = candidates(graph, device)
    chosen = _chosen_cuts(cuts, places, last, graph, len(ranks))
    parts = cut_graph(graph, new, [place.node for place in chosen])
    labels = source_labels(places)
    values = [
        Value(each.name, each.made, each.readers, each.num_bytes, each.has_gradient, labels.get(each.name, ""))
        for each in parts.values
    ]
    routes = plan_routes(values, ranks, mode)
    facts = tuple(_facts(stage, route, device) for stage, route in zip(parts.stages, routes, strict=True))
    for stage in parts.stages:
        schedule_reads(stage.module.graph, new.config.schedule)
        fuse_reads(stage.module.graph)
        relax_checks(stage.module.graph)
        stage.module.recompile()
    return PipelinePlan(
        num_ranks=num_ranks,
        num_virtual=num_virtual,
        placement=placement,
        mode=mode,
        dropout=dropout,
        cuts=tuple(place.node.meta["attn_res"] for place in chosen),
        model_hash=model_hash,
        stages=parts.stages,
        values=tuple(values),
        routes=routes,
        facts=facts,
        traffic={each: traffic_of(values, ranks, each) for each in MODES},
        num_blocks=_num_blocks(new),
        tied=parts.tied,
        aliases=_aliases(new),
    )


def hash_of(graph: fx.Graph) -> str:
    """Return the SHA-256 of what a rewritten graph computes and on which sizes, on whatever device."""
    lines = [
        f"{node.name} {node.op} {_target_name(node)} {_without_devices(node.args)} {_without_devices(node.kwargs)} "
        f"{shape_of(node)}"
        for node in graph.nodes
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_of_model(new: RewrittenModule) -> str:
    """Return the hash that a plan for this model has."""
    return hash_of(unscheduled_graph(new))


def _target_name(node: fx.Node) -> str:
    # a Python function prints with its address
    return str(node.target) if isinstance(node.target, str | torch._ops.OpOverload) else op_name(node)


def _without_devices(arguments: Any) -> str:
    return str(map_aggregate(arguments, lambda value: None if isinstance(value, torch.device) else value))


def _chosen_cuts(
    cuts: str | Sequence[str], places: Sequence[Candidate], last: float, graph: fx.Graph, num_stages: int
) -> list[Candidate]:
    if num_stages - 1 > len(places):
        raise PartitionError(
            explain(
                f"{num_stages} stages need {num_stages - 1} cuts, and the model has {len(places)} reads to cut at",
                remedy="Use fewer ranks or virtual stages.",
            )
        )
    if isinstance(cuts, str):
        if cuts not in ("balanced", "blocks"):
            raise ValueError(f"cuts={cuts!r} must be 'balanced', 'blocks' or a sequence of names of modules")
        return balanced_cuts(places, last, num_stages, at_block_ends=cuts == "blocks")
    if len(cuts) != num_stages - 1:
        raise ValueError(f"{len(cuts)} names of modules cut a model into {len(cuts) + 1} stages, not {num_stages}")
    return named_cuts(places, graph, cuts)


def _aliases(new: RewrittenModule) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, value in new.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    return {name: tuple(other for other in same if other != name) for same in names.values() for name in same}


def _num_blocks(new: RewrittenModule) -> int:
    return sum(len(plan.blocks) for plan in new.programs[new.training].plans)


def _facts(stage: StageGraph, route: StageRoutes, device: Device) -> StageFacts:
    nodes = [node for node in stage.module.graph.nodes if node.op == "call_function"]
    return StageFacts(
        stage=route.stage,
        rank=route.rank,
        modules=tuple(dict.fromkeys(name for node in nodes if (name := _part_of(node)) is not None)),
        num_parameters=sum(parameter.numel() for parameter in stage.module.parameters()),
        flops=sum(flops_of(node) for node in nodes),
        seconds=sum(seconds_of(node, device) for node in nodes),
        inputs=tuple(name for name in stage.inputs if name != KEY),
        receives=route.received,
        reads_from_store=route.cached,
        sends=route.sent,
        recomputed=len(stage.recomputed),
    )


def _part_of(node: fx.Node) -> str | None:
    """Name the numbered layer around a node that multiplies matrices, or the module itself where there is none."""
    path = module_path(node)
    if not flops_of(node) and "embedding" not in str(node.target):
        return None
    numbered = [fqn for fqn in path if fqn.rpartition(".")[2].isdigit()]
    return numbered[0] if numbered else (path[-1] if path else None)
