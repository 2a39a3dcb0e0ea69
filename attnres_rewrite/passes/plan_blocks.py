"""Group the updates of each stream into blocks, and say which reads follow.

    6 updates, num_blocks=3, every state read  ->  blocks (1,2) (3,4) (5,6)
    state   1  2  3  4  5  6
    sources 2  2  3  3  4  4      root + finished blocks + partial sum

`num_blocks` makes exactly that many, as equal as they can be; `block_size` and `block_layers` leave a short
last block. A state nobody reads gets no read; the root has one source, so it gets none either.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import fx

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import UnpreservedReadError, explain
from attnres_rewrite.fxgraph import module_classes, module_path, place_of, source_line
from attnres_rewrite.kernels.checks import check_variant_width
from attnres_rewrite.records import BlockPlan, ReadPlan, ResidualStream

DEFAULT_BLOCKS = 8


def plan_blocks(graph: fx.Graph, streams: Sequence[ResidualStream], config: AttnResConfig) -> tuple[BlockPlan, ...]:
    """Plan every stream; the graph is not changed.

    Raises:
        ValueError: A stream has fewer updates than `num_blocks`, no layers to count by, or a width that `num_heads`
            or `key_rank` does not fit.
        UnpreservedReadError: output="mean", and a consumer depends on the scale of a state.
    """
    if config.output == "mean":
        for stream in streams:
            _refuse_scale_readers(stream)
    for stream in streams:
        check_variant_width(config.num_heads, config.key_rank, stream.width, stream.name)
    plans = [BlockPlan(stream, _blocks(stream, config), ()) for stream in streams]
    parents = {fqn for node in graph.nodes for fqn in module_path(node)[:-1]}
    counters: dict[str, Iterator[int]] = {}
    return tuple(replace(plan, reads=tuple(_reads(plan, parents, counters))) for plan in plans)


def _refuse_scale_readers(stream: ResidualStream) -> None:
    for state, culprit in enumerate(stream.scale_culprits):
        if culprit is not None:
            raise UnpreservedReadError(
                explain(
                    f'output="mean" would change what a consumer of state {state} of {stream.name} computes',
                    place_of(stream.states[state]),
                    f"{culprit}, and a mean is the running sum divided by the number of sources.",
                    'Use output="sum": it preserves every consumer, and through a norm it is the same function.',
                )
            )


def _blocks(stream: ResidualStream, config: AttnResConfig) -> tuple[range, ...]:
    total = len(stream.updates)
    if config.block_layers is not None:
        return tuple(_blocks_of_layers(stream, config.block_layers))
    if config.block_size is not None:
        starts = range(1, total + 1, config.block_size)
        return tuple(range(start, min(start + config.block_size, total + 1)) for start in starts)
    count = config.num_blocks
    if count is None:
        count = min(DEFAULT_BLOCKS, total)
    elif count == "full":
        count = total
    assert isinstance(count, int)
    if count > total:
        raise ValueError(
            f"num_blocks={count} is more than the {total} updates of {stream.name}; "
            f'give at most {total}, "full", or a block_size, which suits streams of every length'
        )
    ends = [1 + (total * block + count - 1) // count for block in range(count + 1)]
    return tuple(range(start, end) for start, end in itertools.pairwise(ends))


def _blocks_of_layers(stream: ResidualStream, layers_per_block: int) -> Iterator[range]:
    """Yield blocks that end where `layers_per_block` more transformer layers have ended."""
    layers = [layer_of(update.add) for update in stream.updates]
    if None in layers:
        at = stream.updates[layers.index(None)].add
        raise ValueError(
            f"block_layers counts numbered layers such as model.layers.3, and the update at {place_of(at)} is in none; "
            "use block_size"
        )
    start, seen = 1, 0
    for number, (layer, following) in enumerate(zip(layers, [*layers[1:], None], strict=True), start=1):
        if layer != following:
            seen += 1
            if seen == layers_per_block or following is None:
                yield range(start, number + 1)
                start, seen = number + 1, 0


def layer_of(node: fx.Node) -> str | None:
    """Return the FQN of the outermost numbered module around a node, e.g. "model.layers.3"."""
    for fqn in module_path(node):
        if fqn.rpartition(".")[2].isdigit():
            return fqn
    return None


def _reads(plan: BlockPlan, parents: set[str], counters: dict[str, Iterator[int]]) -> Iterator[ReadPlan]:
    stream = plan.stream
    for state, (node, readers) in enumerate(zip(stream.states, stream.readers, strict=True)):
        if state == 0 or not readers:
            continue
        owner = _owner(readers, parents)
        index = next(counters.setdefault(owner, itertools.count()))
        yield ReadPlan(
            state=state,
            owner=owner,
            source_line=source_line(node),
            num_sources=plan.num_sources(state),
            name=f"{owner}.attn_res.{index}" if owner else f"attn_res.{index}",
        )


def _owner(readers: Sequence[fx.Node], parents: set[str]) -> str:
    """Return the module whose code reads first; a leaf such as a norm counts as its parent.

    So does a container: in an nn.Sequential, a child more is a layer more.
    """
    modules = list(zip(module_path(readers[0]), module_classes(readers[0]), strict=True))
    if modules and modules[0][0]:
        # Dynamo does not name the module that it compiles
        modules.insert(0, ("", ""))
    if len(modules) > 1 and modules[-1][0] not in parents:
        modules.pop()
    while len(modules) > 1 and modules[-1][1].rpartition(".")[2] in _CONTAINERS:
        modules.pop()
    return modules[-1][0] if modules else ""


_CONTAINERS = frozenset(["Sequential", "ModuleList", "ModuleDict"])
