"""Pipeline: what one rank runs, step by step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from attnres_rewrite.pipeline.failures import ending_together
from attnres_rewrite.pipeline.stage import BlockCacheStage, RankStore, by_position


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
        return [(model_name(name), value) for stage in self.stages for name, value in stage.submod.named_parameters()]

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
            found |= {model_name(name): value for name, value in stage.submod.state_dict().items()}
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
                    value.copy_(state[model_name(name)])

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


def model_name(name: str) -> str:
    """Return the name that a parameter of a stage has in the model; torch.compile and DDP put words before it."""
    return name.partition("graph.")[2]
