"""Find the residual streams of a graph: the adds that carry depth, and no other.

    x1 = x0 + attn(norm(x0));  x2 = x1 + mlp(norm(x1));  y = head(norm(x2))
    ->  ResidualStream(root=x0, updates=(x1, x2))

1. classify_adds: an add is on a stream when one operand (through carriers) is what the other was
   computed from by at least one op that mixes elements ("residual"), or an older state ("skip"), or when
   the other reads an earlier state ("parallel") or nothing of the stream ("inject").
2. link_chains: adds whose stream operand is the result of another make a forest; its longest paths are chains.
3. select_chains: a chain is dropped when it reaches no output, is a star (one mask added in every layer), lies in a
   branch of another, is post-norm, or has one update. Each drop is a reason in the report.
4. describe: the channel axis, the readers of every state, and which states have a reader of their scale.

Does not handle: an active dropout on the stream itself, and streams cut by `cat` or by a change of width
(each piece may be a stream of its own). Streams that exchange updates are refused.
"""

from collections.abc import Sequence

from torch import fx

from attnres_rewrite.errors import (
    AlreadyRewrittenError,
    NoStreamError,
    ParallelStreamsError,
    PostNormError,
    explain,
)
from attnres_rewrite.fxgraph import (
    module_classes,
    module_path,
    place_of,
    reads_shape_only,
    source_line,
    symbolic_shape_of,
    tensor_of,
)
from attnres_rewrite.passes import add_reasons
from attnres_rewrite.passes.carriers import carried_input, carriers_between, carry_axis
from attnres_rewrite.passes.chains import Chain, classify_adds, link_chains
from attnres_rewrite.passes.channel_axis import axis_votes
from attnres_rewrite.passes.reachability import Reachability
from attnres_rewrite.passes.scale_invariance import scale_culprits
from attnres_rewrite.passes.select_chains import select_chains
from attnres_rewrite.records import ResidualStream, StreamSearch, Update


def find_stream(gm: fx.GraphModule) -> StreamSearch:
    """Return the streams of a graph normalised by normalize_adds; the graph is not changed.

    Raises:
        AlreadyRewrittenError: The model's own code mixes depth by attention.
        PostNormError: Every chain is cut by a norm of the sum.
        ParallelStreamsError: Several chains exchange updates, or the model is known to keep several streams.
        NoStreamError: No chain of two or more updates runs to an output.
    """
    _refuse_by_class(gm.graph)
    reach = Reachability(gm.graph)
    chains = link_chains(classify_adds(reach))
    selected, dropped = select_chains(chains, reach)
    if not selected:
        raise _no_stream(gm, chains, dropped, reach)
    streams = _described(gm.graph, selected)
    on_stream = {update.add for stream in streams for update in stream.updates}
    return StreamSearch(streams, add_reasons.left_alone(reach, on_stream, dropped))


def _refuse_by_class(graph: fx.Graph) -> None:
    """Refuse the known designs that replace the residual stream, by the names of their modules.

    Their graphs hold no plain stream, or only pieces of one, and the name gives the better reason.
    """
    for node in graph.nodes:
        for name in (qualified.rpartition(".")[2] for qualified in module_classes(node)):
            if "AttentionResidual" in name or "AttnRes" in name:
                raise AlreadyRewrittenError(
                    explain(
                        f"the model has Attention Residuals of its own ({name})",
                        source_line(node) or None,
                        "It mixes the depth already, so there is no plain residual stream to rewrite.",
                    )
                )
            if "HyperConnection" in name or "AltUp" in name:
                raise ParallelStreamsError(
                    explain(
                        f"the model keeps several parallel streams ({name})",
                        source_line(node) or None,
                        "Hyper-connections and AltUp mix copies of the stream in each layer: none is the running sum.",
                        "Rewrite the variant of the model that has one stream.",
                    )
                )


def _no_stream(
    gm: fx.GraphModule, chains: Sequence[Chain], dropped: dict[fx.Node, str], reach: Reachability
) -> NoStreamError:
    reasons = add_reasons.left_alone(reach, set(), dropped)
    cut = [chain for chain in chains if "post-norm" in dropped.get(chain.end, "")]
    if cut:
        place = place_of(cut[0].adds[0].node)
        return PostNormError(
            explain(
                "the stream passes through a norm between updates (post-norm)",
                place,
                "x = norm(x + f(x)) renormalises the sum, so it is not a sum of updates and has no block form.",
                f"Attention Residuals need a pre-norm network. {len(reasons)} adds were looked at.",
            )
        )
    parallel = [chain for chain in chains if "exchange" in dropped.get(chain.end, "")]
    if parallel:
        return ParallelStreamsError(
            explain(
                f"{len(parallel)} streams exchange updates (hyper-connections, AltUp, reversible layers)",
                place_of(parallel[0].adds[0].node),
                "Each update depends on several running sums, so none of them is the residual stream.",
                "Rewrite the variant of the model that has one stream.",
            )
        )
    first = reasons[0] if reasons else None
    return NoStreamError(
        explain(
            f"no residual stream; {len(reasons)} adds were looked at",
            first.source_line if first else None,
            add_reasons.summary(reasons),
            "A stream is two or more adds x + f(x), each feeding the next, on the way to an output.",
        )
    )


def _described(graph: fx.Graph, chains: Sequence[Chain]) -> tuple[ResidualStream, ...]:
    stream_edges = {add.node: _stream_position(add.node, add.stream) for chain in chains for add in chain.adds}
    culprits = scale_culprits(graph, [add.node for chain in chains for add in chain.adds], stream_edges)
    names = _names(chains)
    return tuple(_describe(chain, name, culprits) for chain, name in zip(chains, names, strict=True))


def _stream_position(add: fx.Node, stream: fx.Node) -> int:
    return 0 if add.args[0] is stream else 1


def _describe(chain: Chain, name: str, culprits: dict[fx.Node, str]) -> ResidualStream:
    updates: list[Update] = []
    for previous, add in zip(chain.states, chain.adds, strict=False):
        position = 1 - _stream_position(add.node, add.stream)
        updates.append(Update(add.node, add.stream, position, add.kind, carriers_between(previous, add.stream)))
    axes = _channel_axes(chain, updates)
    end = tensor_of(chain.end)
    assert end is not None
    following: list[Update | None] = [*updates, None]
    readers = tuple(_readers(state, update) for state, update in zip(chain.states, following, strict=True))
    return ResidualStream(
        name=name,
        root=chain.root,
        updates=tuple(updates),
        width=int(end.shape[axes[-1]]),
        dtype=end.dtype,
        axes=axes,
        readers=readers,
        scale_culprits=(None, *(culprits.get(add.node) for add in chain.adds)),
    )


def _readers(state: fx.Node, following: Update | None) -> tuple[fx.Node, ...]:
    """Return the consumers of a state, looked at through carriers, other than the next add's stream edge."""
    found: list[fx.Node] = []
    todo = [state]
    while todo:
        value = todo.pop()
        for user in value.users:
            if reads_shape_only(user):
                continue
            if carried_input(user) is value:
                todo.append(user)
            if following is not None and user is following.add and user.args[following.branch_position] is not value:
                continue
            if carried_input(user) is not value or _reads_beside(user, value):
                found.append(user)
    return tuple(dict.fromkeys(found))


def _reads_beside(carrier: fx.Node, value: fx.Node) -> bool:
    """Say whether a carrier uses the state a second time, as in x * scale(x)."""
    return sum(arg is value for arg in carrier.args) > 1


def _channel_axes(chain: Chain, updates: Sequence[Update]) -> tuple[int, ...]:
    """Return the channel axis of every state, agreed on by all consumers of all states."""
    moves = [update.carriers for update in updates]
    norms: set[int] = set()
    layers: set[int] = set()
    for index, state in enumerate(chain.states):
        for votes, into in zip(axis_votes(state), (norms, layers), strict=True):
            into |= {first for axis in votes if (first := _at_root(moves[:index], chain, axis)) is not None}
    agreed = norms or layers
    if len(agreed) != 1:
        seen = f"axes {sorted(agreed)}" if agreed else "no axis"
        raise NoStreamError(
            explain(
                f"the channel axis of a stream cannot be told: its readers name {seen}",
                place_of(chain.adds[0].node),
                "A read normalises each source over its channels, and a wrong axis would be a wrong network.",
                "Read the stream through LayerNorm, RMSNorm, GroupNorm, a linear layer or a convolution.",
            )
        )
    axis: int | None = agreed.pop()
    axes: list[int | None] = [axis]
    for path in moves:
        for carrier in path:
            axis = None if axis is None else carry_axis(carrier, axis)
        axes.append(axis)
    width = {
        shape[place]
        for state, place in zip(chain.states, axes, strict=True)
        if place is not None and (shape := symbolic_shape_of(state))
    }
    if None in axes or len(width) != 1 or not isinstance(next(iter(width)), int):
        raise NoStreamError(
            explain(
                "the channels of a stream are split or change size between updates",
                place_of(chain.adds[0].node),
                f"Widths seen: {sorted(map(str, width))}.",
            )
        )
    return tuple(place for place in axes if place is not None)


def _at_root(moves: Sequence[tuple[fx.Node, ...]], chain: Chain, axis: int) -> int | None:
    """Return the axis of the root that carriers take to `axis` of a later state."""
    root = tensor_of(chain.root)
    assert root is not None
    for candidate in range(root.dim()):
        place: int | None = candidate
        for carrier in (carrier for path in moves for carrier in path):
            place = None if place is None else carry_axis(carrier, place)
        if place == axis:
            return candidate
    return None


def _names(chains: Sequence[Chain]) -> list[str]:
    """Name a lone stream "stream", and several after the deepest module that holds each."""
    if len(chains) == 1:
        return ["stream"]
    names: list[str] = []
    for index, chain in enumerate(chains):
        paths = [module_path(add.node) for add in chain.adds]
        shared = [level[0] for level in zip(*paths, strict=False) if len(set(level)) == 1]
        name = next((fqn for fqn in reversed(shared) if fqn), f"stream{index}")
        names.append(name if name not in names else f"{name}#{index}")
    return names
