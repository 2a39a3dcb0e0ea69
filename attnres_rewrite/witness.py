"""The independent meaning of a rewrite: an interpreter over the ORIGINAL graph that carries the sources.

It shares no code with insert_reads or the kernels. Each value on a stream is a list of sources beside the
value that its readers see; an add makes the next list, a carrier maps the list, and the read is evaluated
by the formula of arXiv 2603.15031, written here once more with a stack and a softmax, and so are its variants.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.lifted import LiftedInterpreter, LiftedState
from attnres_rewrite.records import BlockPlan, ReadPlan


@dataclass(frozen=True, slots=True)
class _Step:
    """What happens at the add of update `state`."""

    stream: int
    plan: BlockPlan
    state: int
    read: ReadPlan | None


class DepthInterpreter(LiftedInterpreter):
    """Evaluate a planned rewrite without rewriting anything."""

    def __init__(self, graph: fx.Graph, state: LiftedState, plans: Sequence[BlockPlan], config: AttnResConfig) -> None:
        super().__init__(graph, state)
        self.config = config
        self._steps: dict[fx.Node, _Step] = {}
        # by the number of the stream: several may start at one state, and go through one carrier
        self._roots: dict[fx.Node, list[int]] = {}
        self._carriers: dict[fx.Node, dict[int, fx.Node]] = {}  # carrier -> what it carries
        for stream, plan in enumerate(plans):
            self._roots.setdefault(plan.stream.root, []).append(stream)
            reads = {read.state: read for read in plan.reads}
            for number, update in enumerate(plan.stream.updates, start=1):
                self._steps[update.add] = _Step(stream, plan, number, reads.get(number))
                above = plan.stream.states[number - 1]
                for carrier in update.carriers:
                    self._carriers.setdefault(carrier, {})[stream] = above
                    above = carrier
        self._sources: dict[tuple[int, fx.Node], list[Tensor]] = {}

    def run_lifted(self, leaves: Sequence[Any], seed: int = 0) -> tuple[list[Any], Any]:
        """Run on flat inputs, as LiftedInterpreter does, with fresh sources."""
        self._sources = {}
        return super().run_lifted(leaves, seed)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node on what its readers see, and carry the sources beside it."""
        for stream, above in self._carriers.get(n, {}).items():
            self._sources[stream, n] = [self._apply(n, above, source) for source in self._sources[stream, above]]
        value = self._mixed(n, self._steps[n]) if n in self._steps else super().run_node(n)
        for stream in self._roots.get(n, ()):
            self._sources[stream, n] = [value]
        return value

    def _apply(self, carrier: fx.Node, above: fx.Node, source: Tensor) -> Tensor:
        """Run a carrier on one source in place of the stream value."""
        args, kwargs = self.fetch_args_kwargs_from_env(carrier)
        position = carrier.args.index(above)
        args = (*args[:position], source, *args[position + 1 :])
        return self.call_function(carrier.target, args, kwargs)

    def _mixed(self, node: fx.Node, step: _Step) -> Tensor:
        update = step.plan.stream.updates[step.state - 1]
        sources = list(self._sources[step.stream, update.stream])
        added = self.env[update.branch].expand_as(sources[0])
        if any(step.state == block.start for block in step.plan.blocks):
            sources.append(added)
        else:
            sources[-1] = sources[-1] + added
        self._sources[step.stream, node] = sources
        return torch.stack(sources).sum(0) if step.read is None else self._evaluate(sources, step)

    def _evaluate(self, sources: Sequence[Tensor], step: _Step) -> Tensor:
        """softmax over s of query . (RMSNorm(source_s) * gain), times the sources; for each head, with the bias."""
        assert step.read is not None
        config = self.config
        axis = step.plan.stream.axes[step.state]
        values = torch.stack(list(sources)).movedim(axis + 1, -1)  # [S, ..., D]
        assert values.shape[0] == step.read.num_sources
        width, rank = values.shape[-1], config.key_rank or values.shape[-1]
        keys = values.narrow(-1, width - rank, rank)
        keys = keys / (keys.pow(2).mean(-1, keepdim=True) + config.eps).sqrt()
        parameters = self.state.parameters
        if config.key_norm:
            keys = keys * parameters[f"{step.read.name}.key_norm"]
        logits = torch.einsum(
            "s...d,d,dh->s...h", keys, parameters[step.read.query_name], _heads(rank, config.num_heads, like=values)
        )
        newest = torch.arange(values.shape[0], device=values.device) == values.shape[0] - 1
        logits = logits + config.recency_bias * newest.to(values).reshape(-1, *[1] * (logits.ndim - 1))
        weights = torch.softmax(logits, dim=0)
        mix = torch.einsum("s...h,dh,s...d->...d", weights, _heads(width, config.num_heads, like=values), values)
        if config.gate:
            mix = values.sum(0) + parameters[f"{step.read.name}.gate"] * mix
        elif config.output == "sum":
            mix = mix * values.shape[0]
        mix = mix.movedim(-1, axis)
        # a reader may view it as the model laid it out
        return mix.contiguous() if sources[0].is_contiguous() else mix


def _heads(width: int, num_heads: int, like: Tensor) -> Tensor:
    """Return [width, num_heads]: one where a channel is of a head, which is a run of equally many channels."""
    head = torch.arange(width, device=like.device) // (width // num_heads)
    return (head.unsqueeze(-1) == torch.arange(num_heads, device=like.device)).to(like)


def random_reads(
    plans: Sequence[BlockPlan], parameters: Mapping[str, Tensor], seed: int, num_heads: int = 1
) -> dict[str, Tensor]:
    """Draw queries that make logits of order one, gains around one, and gates, for every read."""
    noise = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for plan in plans:
        for read in plan.reads:
            size = parameters[read.query_name].numel() / num_heads if read.query_name in parameters else 1
            for name, centre, spread in (
                (read.query_name, 0.0, size**-0.5),
                (f"{read.name}.key_norm", 1.0, 0.1),
                (f"{read.name}.gate", 0.0, 1.0),
            ):
                if name in parameters:
                    like = parameters[name]
                    value = centre + spread * torch.randn(
                        like.shape, generator=noise, dtype=torch.float64, device="cpu"
                    )
                    drawn[name] = value.to(like.device).requires_grad_()
    return drawn


def zero_queries(plans: Sequence[BlockPlan], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a zero query for every read, whatever it has learned."""
    return _zeros([read.query_name for plan in plans for read in plan.reads], parameters)


def zero_gates(plans: Sequence[BlockPlan], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a zero gate for every read, and random queries and gains, which must not matter then."""
    closed = _zeros([f"{read.name}.gate" for plan in plans for read in plan.reads], parameters)
    return random_reads(plans, parameters, seed=3) | closed


def _zeros(names: Sequence[str], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(parameters[name]).requires_grad_() for name in names}
