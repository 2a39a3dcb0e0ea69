"""build_pipeline(): the stages of one rank, on a schedule of torch.distributed.pipelining, ready to step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor import DTensor
from torch.fx.node import map_aggregate

from attnres_rewrite.errors import PartitionError, explain
from attnres_rewrite.fxgraph import shape_of, tensor_of
from attnres_rewrite.passes.partition import StageGraph
from attnres_rewrite.pipeline.failures import ending_together
from attnres_rewrite.pipeline.plan import PipelinePlan
from attnres_rewrite.pipeline.planner import plan_routes
from attnres_rewrite.pipeline.schedules import ScheduleFacts, facts_of, placement_for
from attnres_rewrite.pipeline.split_backward import join_parameters
from attnres_rewrite.pipeline.stage import BlockCacheStage, RankStore, StageModule, by_position

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, slots=True)
class TiedParameter:
    """A parameter of several stages: the copies on this rank, and the processes that have others."""

    name: str
    copies: tuple[nn.Parameter, ...]
    group: Any  # a ProcessGroup, or None where all copies are on this rank


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What one rank runs. Call `step(...)`, then `reduce_tied_gradients()`, then the optimizer."""

    schedule: Any  # of torch.distributed.pipelining
    stages: tuple[BlockCacheStage, ...]
    store: RankStore
    tied: tuple[TiedParameter, ...]
    n_microbatches: int

    def step(
        self, *args: Any, target: Any = None, losses: list[Tensor] | None = None, **kwargs: Any
    ) -> tuple[Any, ...] | Any | None:
        """Run forward and backward of one batch, as `schedule.step` does, on every rank.

        Args:
            args: The inputs of the first stage, [n_microbatches * B, ...] where B is the batch of a microbatch; none
                on other ranks.
            target: What the loss is given beside the output, [n_microbatches * B, ...]; other ranks ignore it.
            losses: Filled with the loss of each microbatch on the rank of the last stage.
            kwargs: Inputs that later stages take, by name, on every rank.

        Returns:
            The outputs of all microbatches on the rank of the last stage, None elsewhere.

        Raises:
            ValueError: An input does not have the size of the plan's microbatches times their number.
            PipelineFailedError: Another rank failed; every rank ends with the error of the first one that did.
        """
        with ending_together():
            has_first, has_last = (
                any(getattr(stage, name) for stage in self.stages) for name in ("is_first", "is_last")
            )
            if has_first:
                self._check_inputs(args)
            target, losses = (target, losses) if has_last else (None, None)
            return self.schedule.step(*(args if has_first else ()), target=target, losses=losses, **kwargs)

    def _check_inputs(self, args: Sequence[Any]) -> None:
        first = next(stage for stage in self.stages if stage.is_first)
        examples = dict(zip(by_position(first.inputs), first.input_examples, strict=True))
        if len(args) != len(examples):
            raise ValueError(f"the first stage takes {', '.join(examples)}, and {len(args)} inputs were given")
        for (name, example), value in zip(examples.items(), args, strict=True):
            wanted = (example.shape[0] * self.n_microbatches, *example.shape[1:]) if example.ndim else ()
            if tuple(value.shape) != wanted:
                raise ValueError(
                    f"{name} is {tuple(value.shape)}: {self.n_microbatches} microbatches of "
                    f"{tuple(example.shape)}, the example inputs of the plan, are {wanted}"
                )

    def seed_draws(self, seed: int, step: int = 0) -> None:
        """Seed dropout and other random draws, and say which step comes next; every rank gives the same.

        What a microbatch draws follows from the seed, the step and its number, not from the partition.
        """
        for stage in self.stages:
            stage.seed, stage.step = seed, step - 1

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of this rank's stages, for its optimizer."""
        return [parameter for stage in self.stages for parameter in stage.submod.parameters()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters of this rank's stages under the names they have in the model."""
        return [(_model_name(name), value) for stage in self.stages for name, value in stage.submod.named_parameters()]

    def state_dict(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
        """Return the parameters and buffers of this rank's stages, under the names they have in the model.

        The dicts of all ranks together are a state dict of the rewritten model. The tensors are the stages' own, so
        torch.distributed.checkpoint saves them and loads into them.

        Args:
            optimizer: Of these parameters: its state is in the dict as well, as "optimizer.NAME.KEY". Before its first
                step that state is made, so that a checkpoint can be loaded into it.
        """
        found: dict[str, Tensor] = {}
        for stage in self.stages:
            found |= {_model_name(name): value for name, value in stage.submod.state_dict().items()}
        if optimizer is not None:
            _make_state(optimizer)
            for name, parameter in self.named_parameters():
                found |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load this rank's share of a state dict of the rewritten model, or of what `state_dict` returned.

        Raises:
            KeyError: The state dict lacks something that a stage of this rank has.
        """
        for stage in self.stages:
            own = stage.submod.state_dict()
            with torch.no_grad():
                for name, value in own.items():
                    value.copy_(state[_model_name(name)])

    def reduce_tied_gradients(self) -> None:
        """Add up the gradients of every tied parameter; afterwards all its copies have the sum.

        Every rank calls it after each step, before gradients are clipped: copies that start equal then stay equal.
        """
        for tied in self.tied:
            for parameter in tied.copies:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients = [_local(parameter.grad) for parameter in tied.copies]
            total = torch.stack(gradients).sum(0)
            if tied.group is not None:
                with ending_together():
                    dist.all_reduce(total, group=tied.group)
            for gradient in gradients:
                gradient.copy_(total)


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that an optimizer makes in its first step, by one that changes nothing."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _local(gradient: Any) -> Tensor:
    """Return this process's shard of a gradient that fully_shard distributes: tied copies are sharded alike."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


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

    Gradients are the mean over microbatches, as torch's schedules make them.

    Args:
        plan: Of `partition`; its sizes are those of one microbatch.
        schedule: GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble or DualPipeV.
        n_microbatches: Of one step.
        device: Where this rank computes; its stages are moved there.
        loss_fn: Called with what the model returns and the target of a microbatch; None runs forward only.
        group: Processes of the pipeline; None is all.
        wrap: Applied to the module of each stage: torch.compile, DistributedDataParallel or fully_shard.

    Raises:
        ValueError: The schedule does not fit the plan, or the group has another number of processes.
        PartitionError: The model returns something that is not a tensor, or another rank has another plan.
    """
    facts = _checked(plan, schedule, group)
    plan = with_all_gradients(plan) if facts.splits_backward else plan
    rank, store, examples = dist.get_rank(group), RankStore(), value_examples(plan)
    own = [routes.stage for routes in plan.routes if routes.rank == rank]
    graphs = _with_own_parameters([plan.stages[number] for number in own])
    stages: list[BlockCacheStage] = []
    for number, graph in zip(own, graphs, strict=True):
        is_first, is_last = number == 0, number == len(plan.stages) - 1
        _move_constants(graph.module, torch.device(device))
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
                input_args=_inputs(graph) if is_first else (),
                output_args=_outputs(graph) if is_last else (),
                inputs=graph.inputs,
                group=group,
            )
        )
    made: Any = get_schedule_class(schedule)
    return Pipeline(
        schedule=made(stages if plan.num_virtual > 1 else stages[0], n_microbatches, loss_fn=loss_fn),
        stages=tuple(stages),
        store=store,
        tied=_tied(plan, stages, rank, group),
        n_microbatches=n_microbatches,
    )


def _move_constants(module: fx.GraphModule, device: torch.device) -> None:
    """Make what the graph creates, such as a mask, on `device`: a capture has the device it was made on."""
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = map_aggregate(
                (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
            )
    module.recompile()


def _checked(plan: PipelinePlan, schedule: str, group: dist.ProcessGroup | None) -> ScheduleFacts:
    """Return what the schedule asks of the plan, which has it."""
    placement = placement_for(schedule, plan.num_virtual)
    if placement != plan.placement:
        raise ValueError(f"{schedule} places stages as a {placement}, the plan as a {plan.placement}")
    facts = facts_of(schedule)
    size = dist.get_world_size(group)
    if size != plan.num_ranks:
        raise ValueError(f"the plan is for {plan.num_ranks} ranks, the group has {size}")
    _refuse_other_plans(plan, group)
    return facts


def _refuse_other_plans(plan: PipelinePlan, group: dist.ProcessGroup | None) -> None:
    own = (plan.model_hash, plan.num_virtual, plan.placement, plan.mode, plan.dropout, plan.cuts)
    plans: list[Any] = [own] * plan.num_ranks
    if plan.num_ranks > 1:
        dist.all_gather_object(plans, own, group=group)
    for rank, other in enumerate(plans):
        if other != plans[0]:
            raise PartitionError(
                explain(
                    f"rank {rank} has another plan than rank 0",
                    None,
                    f"Rank 0: {plans[0]}\n  rank {rank}: {other}",
                    "Every rank must rewrite the same model on inputs of the same sizes, and partition it alike.",
                )
            )


def with_all_gradients(plan: PipelinePlan) -> PipelinePlan:
    """Send a gradient for every floating-point value, also for those of frozen parameters: see StageModule."""
    floats = {name for name, example in value_examples(plan).items() if example.is_floating_point()}
    values = tuple(replace(value, has_gradient=value.name in floats) for value in plan.values)
    ranks = [routes.rank for routes in plan.routes]
    return replace(plan, values=values, routes=plan_routes(values, ranks, plan.mode))


def _model_name(name: str) -> str:
    """Return the name that a parameter of a stage has in the model; torch.compile and DDP put words before it."""
    return name.partition("graph.")[2]


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


def _inputs(graph: StageGraph) -> tuple[Tensor, ...]:
    nodes = {str(node.target): node for node in graph.module.graph.find_nodes(op="placeholder")}
    return tuple(_meta(nodes[name], False) for name in by_position(graph.inputs))


def _outputs(graph: StageGraph) -> tuple[Tensor, ...]:
    found = _returned(graph.module)
    return tuple(_meta(node, (value := tensor_of(node)) is not None and value.is_floating_point()) for node in found)


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
    for name, used in plan.tied.items():
        ranks = sorted({plan.routes[number].rank for number in used})
        shared = _new_group(ranks, group) if len(ranks) > 1 else None
        copies = tuple(
            parameter
            for stage in stages
            for own, parameter in stage.submod.named_parameters()
            if _model_name(own) == name and parameter.requires_grad
        )
        if copies:
            found.append(TiedParameter(name, copies, shared))
    return tuple(found)


def _new_group(ranks: list[int], group: dist.ProcessGroup | None) -> Any:
    everywhere = [dist.get_global_rank(group, rank) if group is not None else rank for rank in ranks]
    # other pipelines of the same job make groups of their own, and do not call this
    return dist.new_group(everywhere, use_local_synchronization=True)
