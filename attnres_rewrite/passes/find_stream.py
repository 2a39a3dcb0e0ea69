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
(each piece may be a stream of its own). Streams that exchange updates are refused, but for those of joint_streams.
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
    tensor_of,
    value_inputs,
)
from attnres_rewrite.passes import add_reasons
from attnres_rewrite.passes.carriers import carried_input, carriers_between
from attnres_rewrite.passes.chains import Chain, classify_adds, link_chains
from attnres_rewrite.passes.channel_axis import channel_axes
from attnres_rewrite.passes.reachability import Reachability
from attnres_rewrite.passes.regions import adds_in, find_regions, refuse_cut_streams
from attnres_rewrite.passes.scale_invariance import scale_culprits
from attnres_rewrite.passes.select_chains import Selection, select_chains
from attnres_rewrite.records import LeftAlone, ResidualStream, StreamSearch, Update


def find_stream(gm: fx.GraphModule) -> StreamSearch:
    """Return the streams of a graph normalised by normalize_adds; the graph is not changed.

    Raises:
        AlreadyRewrittenError: The model's own code mixes depth by attention.
        PostNormError: Every chain is cut by a norm of the sum.
        ParallelStreamsError: Several chains exchange updates, or the model is known to keep several streams.
        StreamRegionError: The stream goes through a region under no_grad or autocast.
        NoStreamError: No chain of two or more updates runs to an output.
    """
    _refuse_by_class(gm.graph)
    reach = Reachability(gm.graph)
    selection = select_chains(link_chains(classify_adds(reach), reach), reach)
    dropped = dict(selection.dropped)
    streams = _described(selection.chains, reach, dropped)
    regions = find_regions(gm)
    refuse_cut_streams(regions, streams)
    if not streams:
        raise _no_stream(selection, add_reasons.left_alone(reach, set(), dropped))
    on_stream = {update.add for stream in streams for update in stream.updates}
    return StreamSearch(streams, (*add_reasons.left_alone(reach, on_stream, dropped), *adds_in(regions)))


_OTHER_DESIGNS = (
    (
        ("AttentionResidual", "AttnRes"),
        AlreadyRewrittenError,
        "the model has Attention Residuals of its own ({})",
        ("It mixes the depth already, so there is no plain residual stream to rewrite.",),
    ),
    (
        ("HyperConnection", "AltUp"),
        ParallelStreamsError,
        "the model keeps several parallel streams ({})",
        (
            "Hyper-connections and AltUp mix copies of the stream in each layer: none is the running sum.",
            "Rewrite the variant of the model that has one stream.",
        ),
    ),
)


def _refuse_by_class(graph: fx.Graph) -> None:
    """Refuse the known designs that replace the residual stream, by the names of their modules.

    Their graphs hold no plain stream, or only pieces of one, and the name gives the better reason.
    """
    for node in graph.nodes:
        names = {qualified.rpartition(".")[2] for qualified in module_classes(node)}
        # the AltUp module itself is never called, only what it holds
        names |= {"AltUp" for fqn in module_path(node) if "altup" in fqn.split(".")}
        for name in sorted(names):
            for words, error, what, why in _OTHER_DESIGNS:
                if any(word in name for word in words):
                    raise error(explain(what.format(name), source_line(node) or None, *why))


def _no_stream(selection: Selection, reasons: Sequence[LeftAlone]) -> NoStreamError:
    """Say why nothing is left: in the words of what cut the chains, or by counting the reasons."""
    if selection.cut_by_norm:
        return PostNormError(
            explain(
                "the stream passes through a norm between updates (post-norm)",
                place_of(selection.cut_by_norm[0].adds[0].node),
                "x = norm(x + f(x)) renormalises the sum, so it is not a sum of updates and has no block form.",
                f"Attention Residuals need a pre-norm network. {len(reasons)} adds were looked at.",
            )
        )
    if selection.exchanging:
        return ParallelStreamsError(
            explain(
                f"{len(selection.exchanging)} streams exchange updates (hyper-connections, AltUp, reversible layers)",
                place_of(selection.exchanging[0].adds[0].node),
                "Each update depends on several running sums, so none of them is the residual stream.",
                "Rewrite the variant of the model that has one stream.",
            )
        )
    return NoStreamError(
        explain(
            f"no residual stream; {len(reasons)} adds were looked at",
            reasons[0].source_line if reasons else None,
            add_reasons.summary(reasons),
            "A stream is two or more adds x + f(x), each feeding the next, on the way to an output.",
        )
    )


def _described(chains: Sequence[Chain], reach: Reachability, dropped: dict[fx.Node, str]) -> tuple[ResidualStream, ...]:
    """Describe every chain whose channel axis is known; the others are dropped with the reason."""
    updates = [_updates(chain) for chain in chains]
    axes = [
        channel_axes(chain.states, [update.carriers for update in own], [update.branch for update in own])
        for chain, own in zip(chains, updates, strict=True)
    ]
    kept: list[tuple[Chain, tuple[Update, ...], tuple[int, ...]]] = []
    for chain, own, places in zip(chains, updates, axes, strict=True):
        if isinstance(places, str):
            dropped.update({add.node: places for add in chain.adds})
        else:
            kept.append((chain, own, places))
    stream_edges = {update.add: 1 - update.branch_position for _, own, _ in kept for update in own}
    culprits = scale_culprits(reach.nodes, list(stream_edges), stream_edges)
    names = _names([chain for chain, _, _ in kept])
    return tuple(
        _describe(name, chain, own, places, culprits, reach)
        for name, (chain, own, places) in zip(names, kept, strict=True)
    )


def _updates(chain: Chain) -> tuple[Update, ...]:
    found: list[Update] = []
    for previous, add in zip(chain.states, chain.adds, strict=False):
        branch_position = 1 if add.node.args[0] is add.stream else 0
        carriers = carriers_between(previous, add.stream)
        found.append(Update(add.node, add.stream, branch_position, add.kind, carriers))
    return tuple(found)


def _describe(
    name: str,
    chain: Chain,
    updates: tuple[Update, ...],
    axes: tuple[int, ...],
    culprits: dict[fx.Node, str],
    reach: Reachability,
) -> ResidualStream:
    end = tensor_of(chain.end)
    assert end is not None
    following: list[Update | None] = [*updates, None]
    readers = tuple(
        tuple(sorted(_readers(state, update), key=lambda reader: reach.position[reader]))
        for state, update in zip(chain.states, following, strict=True)
    )
    return ResidualStream(
        name=name,
        root=chain.root,
        updates=updates,
        width=int(end.shape[axes[-1]]),
        dtype=end.dtype,
        axes=axes,
        readers=readers,
        scale_culprits=(None, *(culprits.get(update.add) for update in updates)),
    )


def _readers(state: fx.Node, following: Update | None) -> set[fx.Node]:
    """Return the consumers of a state, looked at through carriers, other than the next add's stream edge."""
    found: set[fx.Node] = set()
    todo = [state]
    while todo:
        value = todo.pop()
        for user in value.users:
            if reads_shape_only(user) or value not in value_inputs(user):
                continue
            if carried_input(user) is value:
                todo.append(user)
            if following is not None and user is following.add and user.args[following.branch_position] is not value:
                continue
            if carried_input(user) is not value or _reads_beside(user, value):
                found.add(user)
    return found


def _reads_beside(carrier: fx.Node, value: fx.Node) -> bool:
    """Say whether a carrier uses the state a second time, as in x * scale(x)."""
    return sum(arg is value for arg in carrier.args) > 1


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
