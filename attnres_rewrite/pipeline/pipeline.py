"""Pipeline: what one rank runs, step by step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnres_rewrite.first_values import Init, fill, lacks_values, placed_as
from attnres_rewrite.pipeline.failures import ending_together
from attnres_rewrite.pipeline.gradients import TiedParameter, add_up, check_unreduced, clip
from attnres_rewrite.pipeline.stage import BlockCacheStage, RankStore, by_position


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What one rank runs. Call `step(...)`, once or more, then `reduce_tied_gradients()`, then the optimizer."""

    schedule: Any  # of torch.distributed.pipelining
    stages: tuple[BlockCacheStage, ...]
    store: RankStore
    tied: tuple[TiedParameter, ...]
    n_microbatches: int
    examples: Mapping[str, Tensor]  # meta tensors of what the stages of all ranks take from the user, one microbatch
    has_loss: bool
    aliases: Mapping[str, tuple[str, ...]]  # other names that the state dict of the model has
    awaited: list[tuple[str, Tensor]]  # parameters and buffers of a model from the meta device, until all have values

    def step(
        self, *args: Any, target: Any = None, losses: list[Tensor] | None = None, **kwargs: Any
    ) -> tuple[Any, ...] | Any | None:
        """Run forward and backward of one batch, as `schedule.step` does, on every rank.

        Gradients are added to those that are there; the model runs forward alone when there is no loss.

        Args:
            args: The inputs of the first stage, [n_microbatches * B, ...] where B is the batch of a microbatch; none
                on other ranks.
            target: What the loss is given beside the output, [n_microbatches * B, ...]; other ranks ignore it.
            losses: Filled with the loss of each microbatch on the rank of the last stage.
            kwargs: Inputs that later stages take, by name, on every rank.

        Returns:
            The outputs of all microbatches on the rank of the last stage, None elsewhere; None there, too, where one
            output is a scalar and has no batch to be joined along.

        Raises:
            TypeError: An input or the target is not a tensor.
            ValueError: An input is missing, is taken by no stage, or does not have the size of the plan's microbatches
                times their number; or the target is missing or cannot be divided.
            PipelineFailedError: Another rank failed; every rank ends with the error of the first one that did.
            RuntimeError: Gradients that `reduce_tied_gradients` added up are still there.
        """
        if self.has_loss:
            with ending_together():
                check_unreduced(self.tied, "step() comes after reduce_tied_gradients()")
        return self._run(self._step_of_schedule, args, target, losses, kwargs)

    def _step_of_schedule(self, *args: Any, **options: Any) -> Any:
        if self.has_loss and self.schedule.scale_grads:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    # at the end of the step torch divides all that is there, not only what the step has added
                    parameter.grad.mul_(self.n_microbatches)
        return self.schedule.step(*args, **options)

    @torch.no_grad()
    def evaluate(
        self, *args: Any, target: Any = None, losses: list[Tensor] | None = None, **kwargs: Any
    ) -> tuple[Any, ...] | Any | None:
        """Run one batch forward alone, and its losses if there is a loss; everything else is as in `step`.

        The stages are those of the mode that the model was in when it was partitioned: dropout stays as it is there.
        What the steps draw does not change by it.
        """
        steps = [stage.step for stage in self.stages]
        try:
            return self._run(self.schedule.eval, args, target, losses, kwargs)
        finally:
            for stage, step in zip(self.stages, steps, strict=True):
                stage.step = step

    def _run(
        self,
        schedule: Callable[..., Any],
        args: tuple[Any, ...],
        target: Any,
        losses: list[Tensor] | None,
        kwargs: dict[str, Any],
    ) -> Any:
        with ending_together():
            self._check_values()
            has_first, has_last = (
                any(getattr(stage, name) for stage in self.stages) for name in ("is_first", "is_last")
            )
            self._check_inputs(args if has_first else (), kwargs)
            if has_last:
                self._check_target(target, losses)
            target, losses = (target, losses) if has_last else (None, None)
            options = kwargs | {"return_outputs": not any(stage.returns_scalars for stage in self.stages)}
            return schedule(*(args if has_first else ()), target=target, losses=losses, **options)

    def _check_values(self) -> None:
        lacking = [name for name, value in self.awaited if lacks_values(value)]
        if lacking:
            raise RuntimeError(
                f"{lacking[0]}, one of {len(lacking)}, has no values yet: the model was on the meta device. Call "
                "pipeline.initialize(model, init), and load_state_dict() after it if there is a checkpoint"
            )
        self.awaited.clear()

    def _check_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        given = dict(kwargs)
        for stage in self.stages:
            names = by_position(stage.inputs)
            if stage.is_first and len(args) != len(names):
                raise ValueError(
                    f"the first stage takes {', '.join(names)} by position, and {len(args)} inputs were given so"
                )
            if stage.is_first:
                given |= zip(names, args, strict=True)
            elif missing := [name for name in names if name not in kwargs]:
                raise ValueError(f"stage {stage.stage_index} takes {', '.join(missing)}: give it by name on this rank")
        if unknown := [name for name in given if name not in self.examples]:
            raise ValueError(
                f"no stage takes {', '.join(unknown)}; the inputs are {', '.join(self.examples)}. "
                "What the model was rewritten without, or ignores, has no place here."
            )
        for name, value in given.items():
            self._check_input(name, value)

    def _check_input(self, name: str, value: Any) -> None:
        example = self.examples[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, not a tensor")
        if not example.ndim:
            raise ValueError(f"{name} is one number: torch cannot cut it into microbatches. Give it a batch dimension")
        wanted = (example.shape[0] * self.n_microbatches, *example.shape[1:])
        if tuple(value.shape) != wanted:
            raise ValueError(
                f"{name} is {tuple(value.shape)}: {self.n_microbatches} microbatches of "
                f"{tuple(example.shape)}, the example inputs of the plan, are {wanted}"
            )

    def _check_target(self, target: Any, losses: list[Tensor] | None) -> None:
        if not self.has_loss and losses is not None:
            raise ValueError("losses are asked for, and there is no loss_fn: give one to build_pipeline")
        if self.has_loss and target is None:
            raise ValueError("the loss needs a target on the rank of the last stage: step(..., target=...)")
        if self.has_loss and not isinstance(target, Tensor):
            raise TypeError(f"the target is a {type(target).__name__}, not a tensor, which is cut into microbatches")
        if isinstance(target, Tensor) and (not target.ndim or target.shape[0] % self.n_microbatches):
            raise ValueError(f"the target is {tuple(target.shape)}: not {self.n_microbatches} equal microbatches")

    def seed_draws(self, seed: int, step: int = 0) -> None:
        """Seed dropout and other random draws, and say which step comes next; every rank gives the same.

        What a microbatch draws follows from the seed, the step and its number, not from the partition.
        """
        for stage in self.stages:
            stage.seed, stage.step = seed, step - 1

    def initialize(self, model: nn.Module, init: Init, *, seed: int = 0) -> None:
        """Give this rank's stages the first values of a model that was partitioned on the meta device.

        The same for every partition, and in all copies of a parameter that several stages use; on GPUs torch draws
        other numbers than on a CPU. Takes and raises what `attnres_rewrite.initialize` does.
        """
        with ending_together():
            fill(self.named_tensors(), model, init, seed)

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Return the parameters and buffers of this rank's stages under the names they have in the model."""
        return [
            (model_name(name), value)
            for stage in self.stages
            for name, value in (*stage.submod.named_parameters(), *stage.submod.named_buffers())
        ]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of this rank's stages, for its optimizer."""
        return [parameter for stage in self.stages for parameter in stage.submod.parameters()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters of this rank's stages under the names they have in the model."""
        return [(model_name(name), value) for stage in self.stages for name, value in stage.submod.named_parameters()]

    def state_dict(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
        """Return the parameters and buffers of this rank's stages, under the names they have in the model.

        The dicts of all ranks together are a state dict of the rewritten model. The tensors are the stages' own, so
        torch.distributed.checkpoint saves them and loads into them; give what it loaded to `load_state_dict`, as a
        tied parameter has several copies on a rank, and one of them is here.

        Args:
            optimizer: Of these parameters: its state is in the dict as well, as "optimizer.NAME.KEY". Before its first
                step that state is made for the dict alone, so that a checkpoint can be loaded into it.
        """
        found: dict[str, Tensor] = {}
        for stage in self.stages:
            for name, value in stage.submod.state_dict().items():
                own = model_name(name)
                found |= {each: value for each in (own, *self.aliases.get(own, ()))}
        if optimizer is not None:
            is_new = not optimizer.state
            _make_state(optimizer)
            for name, parameter in self.named_parameters():
                state = optimizer.state.get(parameter, {})
                found |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
            if is_new:
                # what some optimizers begin with is not what a step without gradients leaves
                optimizer.state.clear()
        return found

    def load_state_dict(self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Load this rank's share of a state dict of the rewritten model, or of what `state_dict` returned.

        Args:
            state: What to load.
            optimizer: Of these parameters; `state` is one that `state_dict` returned with an optimizer.

        Raises:
            KeyError: The state dict lacks something that a stage of this rank, or the optimizer, has.
            ValueError: Something has another shape there; nothing is loaded then.
        """
        with torch.no_grad():
            own = [
                (model_name(name), value) for stage in self.stages for name, value in stage.submod.state_dict().items()
            ]
            states: list[tuple[str, dict[str, Any]]] = []
            if optimizer is not None:
                _make_state(optimizer)
                states = [(name, optimizer.state.get(value, {})) for name, value in self.named_parameters()]
                own += [(f"optimizer.{name}.{key}", value) for name, kept in states for key, value in kept.items()]
            for name, value in own:
                _refuse_another_shape(name, value, state[name])
            for name, value in own:
                if isinstance(value, Tensor):
                    value.copy_(placed_as(value, state[name], is_everywhere=False))
            for name, kept in states:
                for key, value in kept.items():
                    if not isinstance(value, Tensor):
                        kept[key] = state[f"optimizer.{name}.{key}"]

    def reduce_tied_gradients(self) -> None:
        """Add up the gradients of every tied parameter; afterwards all its copies have the sum.

        Every rank calls it once before the optimizer, after the last step whose gradients it takes, and before they are
        clipped: copies that start equal then stay equal.

        Raises:
            RuntimeError: They are added up already.
        """
        check_unreduced(self.tied, "reduce_tied_gradients() is called a second time")
        with ending_together():
            add_up(self.tied)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False) -> Tensor:
        """Clip as `torch.nn.utils.clip_grad_norm_` clips the whole model: by the norm of the gradients of all ranks.

        Every rank calls it, between `reduce_tied_gradients()` and the optimizer. A tied parameter counts once. Stages
        may be in fully_shard or DistributedDataParallel.

        Args:
            max_norm: What the norm is at most afterwards.
            norm_type: The p of the norm, `inf` for the largest gradient.
            error_if_nonfinite: Raise, and clip nothing, where the norm is NaN or infinite.

        Returns:
            The norm before, on every rank the same, float32 or float64.

        Raises:
            RuntimeError: The norm is not finite, if that is an error; or gradients of a tied parameter are not added
                up yet.
            ValueError: `norm_type` is not positive.
        """
        stage = self.stages[0]
        with ending_together():
            return clip(
                self.parameters(), self.tied, max_norm, norm_type, error_if_nonfinite, stage.group, stage.device
            )


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that an optimizer makes in its first step, by one that changes nothing and does not count."""
    if optimizer.state:
        return
    kept = [{name: group[name] for name in ("lr", "weight_decay") if name in group} for group in optimizer.param_groups]
    gradients = {parameter: parameter.grad for group in optimizer.param_groups for parameter in group["params"]}
    for group, options in zip(optimizer.param_groups, kept, strict=True):
        group |= dict.fromkeys(options, 0.0)
    for parameter in gradients:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    for group, options in zip(optimizer.param_groups, kept, strict=True):
        group |= options
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].zero_()


def _refuse_another_shape(name: str, own: Any, saved: Any) -> None:
    """Refuse what copy_ would broadcast without a word."""
    if isinstance(own, Tensor) and own.shape != saved.shape:
        raise ValueError(f"{name} is {list(saved.shape)} in the state dict, and {list(own.shape)} here")


def model_name(name: str) -> str:
    """Return the name that a parameter of a stage has in the model; torch.compile and DDP put words before it."""
    return name.partition("graph.")[2]
