"""BlockCacheStage: a stage of torch.distributed.pipelining that reads blocks from its rank's store.

Forward:  what arrives over the hop, and what the store has, become the inputs of the stage; what a plan keeps is put
          into the store, detached; what only passes through is sent on outside of autograd.
Backward: a stored value is a leaf of the stage that reads it. Its gradient is handed in at the stage of this rank that
          brought the value (a deposit), and that one adds all deposits to what it sends back. The plan says how many
          there are: one more or less raises. What a stage made for later stages of its own rank alone is not sent: it
          is one more output of its backward.

A stored value enters the stage by keyword: torch looks for gradients of keyword inputs as well, in a backward that is
split into input and weight gradients too, and leaves them out of what it sends. Only methods that every torch from 2.11
to 2.15 has are overridden, and what else they are given is passed on; torch's own forward cache is not touched.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from attnres_rewrite.fxgraph import can_learn
from attnres_rewrite.keyed_random import make_key
from attnres_rewrite.passes.key_draws import KEY
from attnres_rewrite.passes.partition import StageGraph
from attnres_rewrite.pipeline.planner import StageRoutes

Key = tuple[int, str, int]  # microbatch, value, the stage of this rank that brought it


class RankStore:
    """The values that one rank keeps for its later stages, and the gradients handed in for them; never a graph."""

    def __init__(self) -> None:
        self.values: dict[Key, Tensor] = {}
        self.deposits: dict[Key, tuple[int, Tensor | None]] = {}

    def hand_in(self, key: Key, gradient: Tensor | None) -> None:
        """Add one gradient; None is one, too: nothing trainable was behind that reading."""
        count, total = self.deposits.get(key, (0, None))
        # out of place: autograd may hand one tensor to two inputs
        self.deposits[key] = (count + 1, _added(total, gradient))

    def collect(self, key: Key, expected: int) -> Tensor | None:
        """Take the sum of the gradients out.

        Raises:
            RuntimeError: There are more or fewer than the plan has.
        """
        count, total = self.deposits.pop(key, (0, None))
        if count != expected:
            microbatch, name, stage = key
            raise RuntimeError(
                f"{count} gradients were handed in for {name} of microbatch {microbatch} at stage {stage}, "
                f"the plan has {expected}: one was lost or counted twice"
            )
        return total

    def clear(self) -> None:
        """Forget everything, as at the start of a step."""
        self.values.clear()
        self.deposits.clear()

    @property
    def is_empty(self) -> bool:
        return not self.values and not self.deposits


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def by_position(inputs: Sequence[str]) -> tuple[str, ...]:
    """Return the inputs that the user gives: all but the key of the random draws."""
    return tuple(name for name in inputs if name != KEY)


def returned_by(routes: StageRoutes) -> tuple[str, ...]:
    """Return what a stage makes for others: what it sends, and what its rank keeps for a later stage of its own."""
    return tuple(name for name in routes.made if name in routes.sent or name in routes.kept)


class StageModule(nn.Module):
    """Calls a stage's graph the way torch.distributed.pipelining calls a stage: with what is on the wire, by position.

    The first stage takes the model's inputs by position, others by name. It returns what it made for others, in the
    order of the wire; the last one what the model returns.

    A schedule that splits the backward detaches what a stage returned, in place, before it works out the gradients of
    the weights. What autograd still needs must be another tensor then: `splits_backward` makes copies of the outputs.
    Its search for the parameters behind each input fails where one input has no gradient, so all have one then, the
    embedding of a frozen table as well.
    """

    def __init__(
        self, stage: StageGraph, routes: StageRoutes, *, is_first: bool, is_last: bool, splits_backward: bool
    ) -> None:
        super().__init__()
        self.graph = stage.module
        self.inputs, self.reads, self.makes = stage.inputs, stage.reads, stage.makes
        self.received, self.cached = routes.received, routes.cached
        self.returned = returned_by(routes)
        self.is_first, self.is_last = is_first, is_last
        self.splits_backward = splits_backward

    def forward(self, *args: Tensor, block_cache: tuple[Tensor, ...] = (), **inputs: Any) -> Any:
        wire = dict(zip(self.received, () if self.is_first else args, strict=True))
        values = wire | dict(zip(self.cached, block_cache, strict=True))
        given = dict(zip(by_position(self.inputs), args, strict=False)) | inputs if self.is_first else inputs
        out = self.graph(*(given[name] for name in self.inputs), *(values[name] for name in self.reads))
        if self.is_last:
            # torch detaches the outputs in place, views excepted: a parameter that is one would learn no more
            out = tuple(value.view_as(value) if isinstance(value, nn.Parameter) else value for value in out)
            return out[0] if len(out) == 1 else out
        made = dict(zip(self.makes, out, strict=True))
        return tuple(self._for_the_wire(made[name]) for name in self.returned)

    def _for_the_wire(self, value: Tensor) -> Tensor:
        if not self.splits_backward:
            return value.contiguous()
        copied = value.clone(memory_format=torch.contiguous_format)
        opens = torch.is_grad_enabled() and can_learn(copied) and not copied.requires_grad
        return copied.requires_grad_() if opens else copied


class BlockCacheStage(PipelineStage):
    """One stage of a plan on its rank.

    Args:
        module: The stage, called as StageModule is; it may be compiled or wrapped for data parallelism.
        routes: What the plan has this stage receive, keep and send.
        store: Of this rank, shared by its stages.
        examples: A meta tensor for each value, with requires_grad where it has a gradient.
        stage_index: Its number.
        num_stages: Of the whole pipeline.
        device: Where it runs.
        input_args: Meta tensors of the model's inputs; of the first stage only.
        output_args: Meta tensors of what the model returns; of the last stage only.
        inputs: Names of the model's inputs that the stage takes, and of the key for random numbers.
        group: Processes of the pipeline; None is all.

    Attributes:
        returns_scalars: The model returns something without a batch dimension.
        seed: Of the random numbers.
        step: Counts the steps begun, from 0; what a microbatch draws follows from seed, step and its number.
    """

    def __init__(
        self,
        module: nn.Module,
        routes: StageRoutes,
        store: RankStore,
        examples: Mapping[str, Tensor],
        stage_index: int,
        num_stages: int,
        device: torch.device,
        *,
        input_args: tuple[Tensor, ...] = (),
        output_args: tuple[Tensor, ...] = (),
        inputs: tuple[str, ...] = (),
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        is_last = stage_index == num_stages - 1
        super().__init__(
            module,
            stage_index,
            num_stages,
            device,
            input_args=input_args if stage_index == 0 else tuple(examples[name] for name in routes.received),
            output_args=output_args if is_last else tuple(examples[name] for name in routes.sent),
            group=group,
        )
        self.routes, self.store, self.inputs = routes, store, inputs
        self.returns_scalars = is_last and any(not example.ndim for example in output_args)
        self.seed, self.step = 0, -1
        self._planned = {name: examples[name] for name in returned_by(routes)}
        self._trainable = {name for name, example in examples.items() if example.requires_grad}
        self._forward_microbatch = self._backward_microbatch = -1
        self._leaves: dict[int, tuple[Tensor, ...]] = {}
        self._unsent: dict[int, dict[str, Tensor]] = {}  # for each microbatch, with the graph that made it

    def _prepare_backward_infra(self, num_microbatches: int, *rest: Any, **options: Any) -> Any:
        """Have what is received require a gradient: torch 2.11 does not after an evaluation that came first."""
        for infos in self.args_recv_info.values() if not self.is_first else ():
            for name, info in zip(self.routes.received, infos, strict=True):
                if name in self._trainable and info.buffer is not None:
                    info.buffer.requires_grad_()
        return super()._prepare_backward_infra(num_microbatches, *rest, **options)

    def forward_one_chunk(self, fwd_chunk_id: int, args: Any, kwargs: Any = None, *rest: Any, **options: Any) -> Any:
        """Take the stored values along as a keyword input."""
        self._forward_microbatch = fwd_chunk_id
        learns = self.has_backward and torch.is_grad_enabled()
        leaves = tuple(
            self.store.values[self._key(fwd_chunk_id, name)].detach().requires_grad_(learns and name in self._trainable)
            for name in self.routes.cached
        )
        if KEY in self.inputs:
            kwargs = {**(kwargs or {}), KEY: make_key(self.seed, self.step, fwd_chunk_id)}
        if leaves:
            kwargs = {**(kwargs or {}), "block_cache": leaves}
            if learns:
                self._leaves[fwd_chunk_id] = leaves
        return super().forward_one_chunk(fwd_chunk_id, args, kwargs, *rest, **options)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stage; keep what the plan keeps, and append what passes through."""
        microbatch, routes, values = self._forward_microbatch, self.routes, self.store.values
        arrived = {} if self.is_first else dict(zip(routes.received, args, strict=True))
        self._keep(microbatch, arrived)
        out = super().forward_maybe_with_nosync(*args, **kwargs)
        if not self.is_last:
            made = {name: self._as_planned(name, value) for name, value in zip(self._planned, out, strict=True)}
            if thawed := [name for name in made if made[name].requires_grad and name not in self._trainable]:
                raise RuntimeError(
                    f"{', '.join(thawed)} would have a gradient, and had none when the model was partitioned: "
                    "something is not frozen any more. Partition the model again"
                )
            self._keep(microbatch, made)
            unsent = {name: made[name] for name in made if name not in routes.sent and name in self._trainable}
            if unsent and self.has_backward and torch.is_grad_enabled():
                self._unsent[microbatch] = unsent
            passing = {
                name: (arrived[name] if name in arrived else values[self._key(microbatch, name)]).detach()
                for name in routes.sent
                if name not in made
            }
            out = tuple(made[name] if name in made else passing[name] for name in routes.sent)
        for name, owner in routes.dropped:
            del values[microbatch, name, owner]
        return out

    def _as_planned(self, name: str, value: Tensor) -> Tensor:
        """Return a value in the dtype that its receivers have room for: autocast may have lowered it."""
        wanted = self._planned[name]
        lowered = value.is_floating_point() and torch.promote_types(value.dtype, wanted.dtype) == wanted.dtype
        if value.shape != wanted.shape or (value.dtype != wanted.dtype and not lowered):
            raise TypeError(
                f"stage {self.stage_index} made {name} as {value.dtype} {list(value.shape)}, and the plan has "
                f"{wanted.dtype} {list(wanted.shape)}: the stages behind would read other numbers. "
                "Rewrite and partition the model in the precision, and on the sizes, that it runs in"
            )
        return value.to(wanted.dtype)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor | None, ...]:
        """Add the deposits to the gradients of what was made here; hand in those of what passed through."""
        gradients: list[Tensor | None] = list(super()._retrieve_recv_grads(bwd_chunk_id))
        for place, name in enumerate(self.routes.sent):
            if name not in self._trainable:
                continue
            key = self._key(bwd_chunk_id, name)
            if name in self.routes.made:
                gradients[place] = _added(gradients[place], self.store.collect(key, self.routes.deposits[name]))
            else:
                self.store.hand_in(key, gradients[place])
        return tuple(gradients)

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: Any, *rest: Any, **options: Any) -> Any:
        """Begin at what is not sent as well; hand in the gradients of the stored values that this stage read."""
        if unsent := self._unsent.pop(self._backward_microbatch, {}):
            totals = {
                name: self.store.collect(self._key(self._backward_microbatch, name), self.routes.deposits[name])
                for name in unsent
            }
            found = [name for name, total in totals.items() if total is not None]
            bwd_kwargs = bwd_kwargs | {
                "stage_output": (*bwd_kwargs["stage_output"], *(unsent[name] for name in found)),
                "output_grads": (*bwd_kwargs["output_grads"], *(totals[name] for name in found)),
            }
        gradients, groups = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, *rest, **options)
        # weight gradients come later and have no inputs
        leaves = self._leaves.pop(self._backward_microbatch, ()) if self._backward_microbatch >= 0 else ()
        places = {id(value): place for place, value in enumerate(bwd_kwargs.get("input_values", ()))} if leaves else {}
        for name, leaf in zip(self.routes.cached if leaves else (), leaves, strict=True):
            if name in self._trainable:
                self.store.hand_in(self._key(self._backward_microbatch, name), gradients[places[id(leaf)]])
        return gradients, groups

    def backward_one_chunk(self, bwd_chunk_id: int, *rest: Any, **options: Any) -> None:
        """Run the backward, then add the deposits to the gradients of what was received."""
        self._backward_microbatch = bwd_chunk_id
        try:
            super().backward_one_chunk(bwd_chunk_id, *rest, **options)
        finally:
            self._backward_microbatch = -1
        if not self.has_backward or self.is_first:
            return
        gradients: list[Tensor | None] = list(self.bwd_cache[bwd_chunk_id])
        for place, name in enumerate(self.routes.received):
            if name in self._trainable:
                deposits = self.store.collect(self._key(bwd_chunk_id, name), self.routes.deposits[name])
                total = _added(gradients[place], deposits)
                gradients[place] = None if total is None else total.contiguous()
        self.bwd_cache[bwd_chunk_id] = tuple(gradients)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *rest: Any, **options: Any) -> None:
        """Run what is left of the backward: all of it on the first stage, where nothing waits for gradients."""
        self._backward_microbatch = bwd_chunk_id if self.is_first else -1
        try:
            super().backward_weight_one_chunk(bwd_chunk_id, *rest, **options)
        finally:
            self._backward_microbatch = -1

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        """Hand nothing to a stage before on the same rank when there is no backward; torch does not ask whether."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """Take the gradients of a stage behind on the same rank, if there is a backward."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def scale_grads(self, grad_scale_factor: int) -> None:
        """Divide the gradients by the number of microbatches, if there was a backward; torch does so without one."""
        if self.has_backward:
            super().scale_grads(grad_scale_factor)

    def clear_runtime_states(self) -> None:
        """Begin a step: forget what an earlier one may have left."""
        super().clear_runtime_states()
        self.step += 1
        self.store.clear()
        self._leaves.clear()
        self._unsent.clear()

    def _key(self, microbatch: int, name: str) -> Key:
        return microbatch, name, self.routes.owners[name]

    def _keep(self, microbatch: int, values: Mapping[str, Tensor]) -> None:
        for name in self.routes.kept:
            if name in values:
                self.store.values[microbatch, name, self.stage_index] = values[name].detach()
