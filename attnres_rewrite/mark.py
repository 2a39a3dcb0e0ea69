"""The mark that an attached model leaves in whatever is traced from its forward, and that stops it elsewhere.

    forward(ids)   ->   token = mark([queries and gains], facts);  forward(marked(ids, token))

Dynamo makes the queries and gains inputs of the graph, with guards, as it does with any parameter in use. The backend
takes the mark out again and puts reads in. In every other place, an uncompiled call or another backend, `mark` raises
as it runs; and it does run: it has a side effect, and each tensor that is an argument comes out of `marked`, which
needs its token.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from attnres_rewrite.config import AttnResConfig, config_from, describe_config
from attnres_rewrite.errors import NotCompiledError, explain


@dataclass(frozen=True, slots=True)
class AttachedRead:
    """One read of an attached stream.

    `name` is the FQN of its parameters' module, seen from the attached model; `owners` are those of the module that
    reads, which goes by several where it is shared.
    """

    state: int
    name: str
    owners: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AttachedStream:
    """One stream that attach() found, with the reads it made parameters for; `ends` are the last updates of blocks."""

    name: str
    width: int
    num_updates: int
    ends: tuple[int, ...]
    reads: tuple[AttachedRead, ...]


@dataclass(frozen=True, slots=True)
class Attachment:
    """What attach() decided, once: it travels in the mark, so that the backend needs nothing else."""

    config: AttnResConfig
    streams: tuple[AttachedStream, ...]

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """FQNs of the queries, gains and gates, in the order in which the mark holds them."""
        return tuple(
            f"{read.name}.{kind}"
            for stream in self.streams
            for read in stream.reads
            for kind in self.config.parameter_sizes(stream.width)
        )

    def to_json(self) -> str:
        """Return the attachment as text; equal attachments give equal text."""
        streams = [asdict(stream) for stream in self.streams]
        return json.dumps({"config": describe_config(self.config), "streams": streams}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Attachment":
        """Return the attachment that `to_json` wrote."""
        facts = json.loads(text)
        return cls(config_from(facts["config"]), tuple(_stream_from(stream) for stream in facts["streams"]))


def _stream_from(facts: dict[str, Any]) -> AttachedStream:
    reads = tuple(AttachedRead(read["state"], read["name"], tuple(read["owners"])) for read in facts["reads"])
    return AttachedStream(facts["name"], facts["width"], facts["num_updates"], tuple(facts["ends"]), reads)


def mark_inputs(
    parameters: Sequence[Tensor], facts: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs of a call, every argument that is a tensor marked; runs under Dynamo.

    Raises:
        NotCompiledError: Nothing traces this call.
    """
    token = torch.ops.attnres.mark(list(parameters), facts)
    marked = tuple(torch.ops.attnres.marked(value, token) if isinstance(value, Tensor) else value for value in args)
    named = {
        key: torch.ops.attnres.marked(value, token) if isinstance(value, Tensor) else value
        for key, value in kwargs.items()
    }
    return marked, named


@torch.library.custom_op("attnres::mark", mutates_args=())
def _mark(parameters: list[Tensor], facts: str) -> Tensor:
    """Return a token; only ever traced."""
    raise NotCompiledError(
        explain(
            "an attached model runs, and not through the backend that puts its reads in",
            None,
            "It would compute the network as it was before attach(). Nothing compiled this call, another backend did, "
            "or torch.compile gave up after torch._dynamo.config.recompile_limit recompilations: then raise it.",
            'Compile it first, model.compile(backend="attnres"), or call it inside `with attnres_rewrite.original'
            "(model):` to run the network without its reads on purpose.",
        )
    )


@_mark.register_fake
def _(parameters: list[Tensor], facts: str) -> Tensor:
    # of integers, so that autograd leaves it alone
    return parameters[0].new_empty((), dtype=torch.int64)


# else a compiler drops it where nothing needs its token: all tensors are in a dict, or there are none
has_side_effect(torch.ops.attnres.mark.default)


@torch.library.custom_op("attnres::marked", mutates_args=())
def _marked(value: Tensor, token: Tensor) -> Tensor:
    """Return the value; only ever traced."""
    return value.clone()


@_marked.register_fake
def _(value: Tensor, token: Tensor) -> Tensor:
    return torch.empty_like(value)


_marked.register_autograd(lambda ctx, gradient: (gradient, None))
