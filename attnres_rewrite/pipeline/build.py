"""build_pipeline(): the stages of one rank, on a schedule of torch.distributed.pipelining, ready to step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.pipelining.schedules import get_schedule_class

from attnres_rewrite.errors import PartitionError, explain
from attnres_rewrite.first_values import give_memory
from attnres_rewrite.fxgraph import can_learn, shape_of, tensor_of
from attnres_rewrite.moving import move_attributes, move_graph
from attnres_rewrite.passes.partition import StageGraph
from attnres_rewrite.pipeline.gradients import TiedParameter
from attnres_rewrite.pipeline.pipeline import Pipeline, model_name
from attnres_rewrite.pipeline.plan import PipelinePlan
from attnres_rewrite.pipeline.planner import plan_routes
from attnres_rewrite.pipeline.schedules import SPLITS_SINCE, ScheduleFacts, facts_of, placement_for, runs_here
from attnres_rewrite.pipeline.split_backward import join_parameters
from attnres_rewrite.pipeline.stage import BlockCacheStage, RankStore, StageModule, by_position

Loss = Callable[[Any, Any], Tensor]


def build_pipeline(
    plan: PipelinePlan,
    schedule: str = "Interleaved1F1B",
    *,
    n_microbatches: int,
    device: torch.device | str,
    loss_fn: Loss | None = None,
    group: dist.ProcessGroup | None = None,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> Pipeline:
    """Build this rank's part of a plan. Every rank of `group` calls it with the same plan.

    Gradients are the mean over microbatches, as torch's schedules make them. A plan is built once: its stages are used.
    What other ranks run is freed when neither the plan nor the model is referred to any more.

    The stages of a model on the meta device get memory, and values by `Pipeline.initialize`.

    Args:
        plan: Of `partition`; its sizes are those of one microbatch.
        schedule: GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble or DualPipeV.
        n_microbatches: Of one step.
        device: Where this rank computes; its stages are moved there.
        loss_fn: Called with what the model returns and the target of a microbatch; None runs forward only. Every rank
            gives one, or none does.
        group: Processes of the pipeline; None is all.
        wrap: Applied to the module of each stage: torch.compile, DistributedDataParallel or fully_shard.

    Raises:
        ValueError: The schedule does not fit the plan, the microbatches or the version of torch, or the group has
            another number of processes.
        PartitionError: The model returns something that is not a tensor, a later stage takes an input with the name of
            an argument of `Pipeline.step`, or another rank builds something else.
    """
    facts = _checked(plan, schedule, n_microbatches, loss_fn, group)
    outputs = _outputs(plan.stages[-1])
    plan = with_all_gradients(plan) if facts.splits_backward else plan
    rank, store, examples = dist.get_rank(group), RankStore(), value_examples(plan)
    own = [routes.stage for routes in plan.routes if routes.rank == rank]
    graphs = _with_own_parameters([plan.stages[number] for number in own])
    stages: list[BlockCacheStage] = []
    awaits_values = False
    for number, graph in zip(own, graphs, strict=True):
        is_first, is_last = number == 0, number == len(plan.stages) - 1
        awaits_values |= _put_on(graph.module, torch.device(device))
        if facts.splits_backward and not is_first:
            join_parameters(graph.module, len(graph.inputs))
        module: nn.Module = StageModule(
            graph, plan.routes[number], is_first=is_first, is_last=is_last, splits_backward=facts.splits_backward
        ).to(device)
        stages.append(
            BlockCacheStage(
                wrap(module) if wrap else module,
                plan.routes[number],
                store,
                examples,
                number,
                len(plan.stages),
                torch.device(device),
                input_args=tuple(_inputs(graph).values()) if is_first else (),
                output_args=outputs if is_last else (),
                inputs=graph.inputs,
                group=group,
            )
        )
    made: Any = get_schedule_class(schedule)
    pipeline = Pipeline(
        schedule=made(stages if plan.num_virtual > 1 else stages[0], n_microbatches, loss_fn=loss_fn),
        stages=tuple(stages),
        store=store,
        tied=_tied(plan, stages, rank, group),
        n_microbatches=n_microbatches,
        examples={name: example for stage in plan.stages for name, example in _inputs(stage).items()},
        has_loss=loss_fn is not None,
        aliases=plan.aliases,
        awaited=[],
    )
    if awaits_values:
        pipeline.awaited.extend(pipeline.named_tensors())
    return pipeline


def _put_on(module: fx.GraphModule, device: torch.device) -> bool:
    """Have a stage make what it makes on its device, with memory for what is on meta; say whether something was."""
    move_graph(module.graph, device)
    move_attributes(module, [module.graph], device)
    module.recompile()
    is_meta = any(value.is_meta for value in (*module.parameters(), *module.buffers()))
    give_memory(module, device)
    return is_meta


def _checked(
    plan: PipelinePlan, schedule: str, n_microbatches: int, loss_fn: Loss | None, group: dist.ProcessGroup | None
) -> ScheduleFacts:
    """Return what the schedule asks of the plan, which has it."""
    placement = placement_for(schedule, plan.num_virtual)
    if placement != plan.placement:
        raise ValueError(f"{schedule} places stages as a {placement}, the plan as a {plan.placement}")
    facts = facts_of(schedule)
    if not runs_here(schedule):
        raise ValueError(
            f"{schedule} needs torch {SPLITS_SINCE} or newer, and this is {torch.__version__}: "
            "older ones give wrong gradients where they split a backward. 1F1B and Interleaved1F1B run on every version"
        )
    _refuse_names_of_step(plan)
    if n_microbatches < 1:
        raise ValueError(f"n_microbatches={n_microbatches} must be at least 1")
    size = dist.get_world_size(group)
    if size != plan.num_ranks:
        raise ValueError(f"the plan is for {plan.num_ranks} ranks, the group has {size}")
    _refuse_other_plans(
        (
            *(plan.model_hash, plan.num_virtual, plan.placement, plan.mode, plan.dropout, plan.cuts),
            # of another dtype, or frozen elsewhere
            tuple((value.num_bytes, value.has_gradient) for value in plan.values),
            (schedule, n_microbatches, "no loss_fn" if loss_fn is None else "a loss_fn"),
        ),
        plan,
        group,
    )
    return facts


# what step() and the schedules of torch call their own
_NAMES_OF_STEP = ("target", "losses", "return_outputs")


def _refuse_names_of_step(plan: PipelinePlan) -> None:
    """Refuse inputs that a later stage takes by name, when step() has an argument of that name."""
    for number, stage in enumerate(plan.stages):
        taken = [name for name in by_position(stage.inputs) if name in _NAMES_OF_STEP]
        if number and taken:
            raise PartitionError(
                explain(
                    f"stage {number} takes an input that is called {taken[0]}",
                    None,
                    f"Later stages get their inputs by name, and step({taken[0]}=...) is something else.",
                    "Call the input otherwise in the model's forward; labels, for example.",
                )
            )


def _refuse_other_plans(own: tuple[Any, ...], plan: PipelinePlan, group: dist.ProcessGroup | None) -> None:
    plans: list[Any] = [own] * plan.num_ranks
    if plan.num_ranks > 1:
        dist.all_gather_object(plans, own, group=group)
    for rank, other in enumerate(plans):
        if other != plans[0]:
            raise PartitionError(
                explain(
                    f"rank {rank} has another plan or schedule than rank 0",
                    None,
                    f"Rank 0: {plans[0]}\n  rank {rank}: {other}",
                    "Every rank must rewrite the same model on inputs of the same sizes, partition it alike, and call "
                    "build_pipeline alike.",
                )
            )


def with_all_gradients(plan: PipelinePlan) -> PipelinePlan:
    """Send a gradient for every value that can have one, also for those of frozen parameters: see StageModule."""
    learning = {name for name, example in value_examples(plan).items() if can_learn(example)}
    values = tuple(replace(value, has_gradient=value.name in learning) for value in plan.values)
    ranks = [routes.rank for routes in plan.routes]
    return replace(plan, values=values, routes=plan_routes(values, ranks, plan.mode))


def value_examples(plan: PipelinePlan) -> dict[str, Tensor]:
    """Return a meta tensor for each value that crosses; it requires a gradient if something trainable feeds it."""
    trainable = {value.name for value in plan.values if value.has_gradient}
    return {
        name: _meta(node, name in trainable)
        for stage in plan.stages[:-1]
        for name, node in zip(stage.makes, _returned(stage.module), strict=True)
    }


def _meta(node: object, requires_grad: bool) -> Tensor:
    value, shape = tensor_of(node), shape_of(node)
    if value is None or shape is None:
        raise PartitionError(
            explain(
                "the model returns something that is not a tensor",
                None,
                "The last stage of a pipeline hands tensors to the loss.",
                "Rewrite the model with inputs for which it returns tensors alone, such as use_cache=False.",
            )
        )
    return torch.empty(shape, dtype=value.dtype, device="meta").requires_grad_(requires_grad)


def _returned(module: fx.GraphModule) -> tuple[object, ...]:
    return tuple(module.graph.output_node().args[0])  # type: ignore[arg-type]


def _inputs(graph: StageGraph) -> dict[str, Tensor]:
    nodes = {str(node.target): node for node in graph.module.graph.find_nodes(op="placeholder")}
    return {name: _meta(nodes[name], False) for name in by_position(graph.inputs)}


def _outputs(graph: StageGraph) -> tuple[Tensor, ...]:
    found = _returned(graph.module)
    return tuple(_meta(node, (value := tensor_of(node)) is not None and can_learn(value)) for node in found)


def _with_own_parameters(graphs: list[StageGraph]) -> list[StageGraph]:
    """Give each stage of a rank parameters of its own: torch scales the gradients of each stage."""
    seen: set[int] = set()
    for graph in graphs:
        for name, parameter in list(graph.module.named_parameters()):
            if id(parameter) in seen:
                owner = graph.module.get_submodule(name.rpartition(".")[0])
                twin = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                owner.register_parameter(name.rpartition(".")[2], twin)
            seen.add(id(parameter))
    return graphs


def _tied(
    plan: PipelinePlan, stages: list[BlockCacheStage], rank: int, group: dist.ProcessGroup | None
) -> tuple[TiedParameter, ...]:
    found: list[TiedParameter] = []
    groups: dict[tuple[int, ...], Any] = {}
    for name, used in plan.tied.items():
        ranks = tuple(sorted({plan.routes[number].rank for number in used}))
        if ranks not in groups:
            groups[ranks] = _new_group(ranks, group) if len(ranks) > 1 else None
        copies = tuple(
            parameter
            for stage in stages
            for own, parameter in stage.submod.named_parameters()
            if model_name(own) == name and parameter.requires_grad
        )
        if copies:
            found.append(TiedParameter(name, copies, len(used), groups[ranks]))
    return tuple(found)


def _new_group(ranks: tuple[int, ...], group: dist.ProcessGroup | None) -> Any:
    everywhere = [dist.get_global_rank(group, rank) if group is not None else rank for rank in ranks]
    # other pipelines of the same job make groups of their own, and do not call this
    return dist.new_group(everywhere, use_local_synchronization=True)
