"""The facts that one stage hands to the next, and the glossary of the project.

*stream*  the running residual sum.
*state*   its value after k updates; state 0 is the *root* (the embedding).
*update*  what one sub-layer adds: x_k = carry(x_{k-1}) + u_k.
*carrier* an op on the stream between two states that acts on each summand alone: a cast, a view, a
          constant scale. It is applied to every source.
*block*   consecutive updates.
*source*  what a read mixes: the root, the finished blocks, the partial sum of the open block.
*read*    the softmax-weighted mix that replaces a state for its consumers.
*reader*  a consumer of a state other than the next add.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

UpdateKind = Literal["residual", "parallel", "skip", "inject"]


@dataclass(frozen=True, slots=True)
class Update:
    """One add on the stream: `add` = `stream` + `branch`.

    kind: "residual", the branch reads the state it is added to; "parallel", it reads an earlier state;
    "skip", it is an earlier state itself; "inject", it does not read the stream.
    """

    add: fx.Node
    stream: fx.Node  # the operand on the stream: the last carrier, or the previous state itself
    branch_position: int  # of the other operand among the arguments of `add`
    kind: UpdateKind
    carriers: tuple[fx.Node, ...]  # from the previous state (exclusive) to `stream`, in order

    @property
    def branch(self) -> fx.Node:
        branch = self.add.args[self.branch_position]
        assert isinstance(branch, fx.Node)
        return branch


@dataclass(frozen=True, slots=True)
class ResidualStream:
    """One residual stream of a graph: a root and the updates added to it."""

    name: str  # "stream" when alone, else the deepest module that holds it, e.g. "model.encoder"
    root: fx.Node
    updates: tuple[Update, ...]
    width: int  # size of the channel axis, D
    dtype: torch.dtype  # of the last state
    axes: tuple[int, ...]  # the channel axis of each state, counted from 0
    readers: tuple[tuple[fx.Node, ...], ...]  # of each state; carriers are looked through
    scale_culprits: tuple[str | None, ...]  # of each state: what depends on its scale, if anything

    @property
    def states(self) -> tuple[fx.Node, ...]:
        return (self.root, *(update.add for update in self.updates))


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """An add that was looked at and is not an update.

    Attributes:
        node: Its name in the graph.
        source_line: "file.py:12", or "" when the capture kept none.
        owner: Name of the module that adds.
        reason: Why it is no update.
    """

    node: str
    source_line: str
    owner: str
    reason: str


@dataclass(frozen=True, slots=True)
class StreamSearch:
    """What find_stream saw in one graph."""

    streams: tuple[ResidualStream, ...]
    left_alone: tuple[LeftAlone, ...]


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """One read to insert: which state, mixing how many sources, with which parameters."""

    state: int
    owner: str  # FQN of the module whose code reads the state first; "" is the model itself
    source_line: str  # of the add that made the state
    num_sources: int
    name: str  # FQN of the parameters' module, e.g. "model.layers.3.attn_res.1"

    @property
    def query_name(self) -> str:
        return f"{self.name}.query"


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """How the updates of one stream are grouped, and the reads that follow from it.

    Update k (1 <= k <= L) is in block b when k is in blocks[b]; the blocks are consecutive.
    """

    stream: ResidualStream
    blocks: tuple[range, ...]
    reads: tuple[ReadPlan, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """The last update of each block."""
        return tuple(block[-1] for block in self.blocks)

    def num_sources(self, state: int) -> int:
        """Sources of `state`: the root, the blocks that ended before it, and its open block."""
        return 1 + sum(block.start <= state for block in self.blocks)


@dataclass(frozen=True, slots=True)
class ReadGroup:
    """Reads that mix the same finished sources, and how they are computed: schedule_reads chose by the bytes.

    Bytes are those a token moves in one training step, forward and backward, under each schedule.

    Attributes:
        reads: Names of their parameters' modules, as in ReadPlan.name.
        num_finished: Sources they share.
        num_merges: Reads that mix a partial sum, too.
        schedule: "direct" or "two_phase".
        direct_bytes: When each read mixes all its sources.
        two_phase_bytes: When the shared sources are mixed once.
    """

    reads: tuple[str, ...]
    num_finished: int
    num_merges: int
    schedule: str
    direct_bytes: int
    two_phase_bytes: int


@dataclass(frozen=True, slots=True)
class FusedRead:
    """What runs in one pass with the merge of a read: fuse_reads found its neighbours, or says why not."""

    read: str  # as in ReadPlan.name
    neighbours: tuple[str, ...]  # of "add", "rms norm", "layer norm"; empty when the read is alone
    reason: str  # why a neighbour is not in it; "" when all are


@dataclass(frozen=True, slots=True)
class FixedDim:
    """A dimension of an input that the captured program takes in one size only.

    Attributes:
        argument: Name of the input.
        dim: Which of its dimensions, counted from 0.
        size: The only one it may have.
    """

    argument: str
    dim: int
    size: int


@dataclass(frozen=True, slots=True)
class Captured:
    """A model as graphs: one for each mode that was captured, sharing every parameter.

    `programs` maps a training flag to its graph in ATen training IR; passes edit the graphs, and the code that
    runs is generated once, in RewrittenModule. Both flags map to one graph when
    the modes do not differ; a flag is absent when the capture could not cover it.
    """

    programs: Mapping[bool, fx.GraphModule]
    training: bool  # the mode of the model when it came in
    route: str  # e.g. "torch.export(strict=False, dynamic)"
    fixed_dims: tuple[FixedDim, ...]
    seconds: float
    notes: tuple[str, ...] = ()  # what was not captured, and why


def counted(number: int, noun: str) -> str:
    """Spell a number of things: "1 read", "2,048 reads"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
