"""Keep the chains that are residual streams of the network: step 3 of find_stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import fx

from attnres_rewrite.fxgraph import is_floating, op_name, place_of, reads_shape_only, value_inputs, written_inputs
from attnres_rewrite.passes import post_norm
from attnres_rewrite.passes.carriers import carried_input, carriers_between, stream_root
from attnres_rewrite.passes.chains import Chain
from attnres_rewrite.passes.joint_streams import Group, joint_groups
from attnres_rewrite.passes.normalize_adds import SharedMemory
from attnres_rewrite.passes.reachability import Reachability


@dataclass(frozen=True, slots=True)
class Selection:
    """The chains that are streams, and of all others why not."""

    chains: tuple[Chain, ...]  # in graph order
    dropped: dict[fx.Node, str]  # add -> reason
    cut_by_norm: tuple[Chain, ...]  # dropped as post-norm
    exchanging: tuple[Chain, ...]  # dropped because they exchange updates


def select_chains(chains: Sequence[Chain], reach: Reachability) -> Selection:
    """Drop every chain that some reason speaks against; the reasons are asked in a fixed order."""
    dropped: dict[fx.Node, str] = {}
    kept: list[Chain] = []
    unfinished: list[Chain] = []  # of chains that reach no output, what does
    alive = _nodes_before_output(reach)
    for whole in chains:
        chain = _trimmed(whole)
        reason = _why_no_stream(chain, alive)
        lost = whole.adds if reason else set(whole.adds) - set(chain.adds)
        dropped |= {add.node: reason or _NOT_READING for add in lost}
        if reason is None:
            kept.append(chain)
        elif reason == _DEAD:
            unfinished.append(_living(chain, alive))
    joint = joint_groups([chain for chain in (*kept, *unfinished) if len(chain.adds) > 1], reach, _exchange)
    kept += [chain for chain in unfinished if any(chain.end in group for group in joint)]
    on_kept = {add.node for chain in kept for add in chain.adds}
    dropped = {add: reason for add, reason in dropped.items() if add not in on_kept}
    by_rule: dict[str, list[Chain]] = {}
    for rule in (_overwritten, _stars, _nested, _cut_by_norm, _cut_by_activation, _single, _exchanging):
        reasons = rule(kept, reach, joint)
        by_rule[rule.__name__] = [kept[index] for index in reasons]
        for index, reason in reasons.items():
            dropped |= {add.node: reason for add in kept[index].adds}
        kept = [chain for index, chain in enumerate(kept) if index not in reasons]
    exchanging = by_rule["_exchanging"] or (_leaking(by_rule["_stars"], reach) if not kept else [])
    kept.sort(key=lambda chain: reach.position[chain.root])
    return Selection(tuple(kept), dropped, tuple(by_rule["_cut_by_norm"]), tuple(exchanging))


_NOT_READING = "adds a value that does not read the stream"


def _why_no_stream(chain: Chain, alive: set[fx.Node]) -> str | None:
    if not any(add.kind == "residual" for add in chain.adds):
        return _NOT_READING
    return None if chain.end in alive else _why_dead(chain)


def _living(chain: Chain, alive: set[fx.Node]) -> Chain:
    """Cut off the adds that reach no output: of two streams that run side by side, one may be read for the other."""
    return Chain(chain.root, tuple(add for add in chain.adds if add.node in alive))


def _trimmed(chain: Chain) -> Chain:
    """Cut injections off both ends: in front they belong to the embedding, behind to the head."""
    root, adds = chain.root, list(chain.adds)
    while adds and adds[-1].kind == "inject":
        adds.pop()
    while len(adds) > 1 and adds[0].kind == "inject" and _only_user(root) is adds[0].node:
        root = adds.pop(0).node
    return Chain(root, tuple(adds))


def _only_user(node: fx.Node) -> fx.Node | None:
    """Return the one consumer of a value, through carriers, or None when it has several."""
    users: list[fx.Node] = []
    todo = [node]
    while todo:
        value = todo.pop()
        for user in value.users:
            if carried_input(user) is value:
                todo.append(user)
            elif not reads_shape_only(user) and value in value_inputs(user):
                users.append(user)
    return users[0] if len(users) == 1 else None


def _why_dead(chain: Chain) -> str:
    if any(written_inputs(user) for user in chain.end.users):
        return "is written in place into another tensor: a recurrence inside a layer"
    return _DEAD


_DEAD = "its result reaches no output"


def _nodes_before_output(reach: Reachability) -> set[fx.Node]:
    alive: set[fx.Node] = set()
    for node in reversed(reach.nodes):
        if node.op == "output" or any(user in alive for user in node.users):
            alive.add(node)
    return alive


Reasons = dict[int, str]  # index of a dropped chain -> why


def _overwritten(chains: Sequence[Chain], reach: Reachability, _: Sequence[Group]) -> Reasons:
    """What is written into later, a state, a copy or view of it, or an update, is not what its node says in a read."""
    writers = [node for node in reach.nodes if any(is_floating(target) for target in written_inputs(node))]
    if not writers:
        return {}
    memory = SharedMemory(reach.nodes)
    last_write: dict[int, fx.Node] = {}  # of a group of nodes that share memory
    for writer in writers:
        for target in written_inputs(writer):
            last_write[id(memory.group_of[target])] = writer
    reasons: Reasons = {}
    for index, chain in enumerate(chains):
        held = [(state, state) for state in chain.states] + [(add.branch, add.node) for add in chain.adds]
        for state, add in zip(chain.states, chain.adds, strict=False):
            held += [(carrier, carrier) for carrier in carriers_between(state, add.stream)]
        for value, since in held:
            writer = last_write.get(id(memory.group_of[value]))
            if writer is not None and reach.position[writer] > reach.position[since]:
                reasons[index] = f"is written in place later, by {op_name(writer)} at {place_of(writer)}"
    return reasons


def _stars(chains: Sequence[Chain], reach: Reachability, joint: Sequence[Group]) -> Reasons:
    """A stream carries its state on: mostly, the next add lies on every way from a state to the outputs.

    A mask or a position bias that is added in every layer is no stream: what follows leaves it behind. A stream beside
    others is left by what they read of it.
    """
    if not chains:
        return {}
    closer = _post_dominators(chains, reach)
    reasons: Reasons = {}
    for index, chain in enumerate(chains):
        if any(chain.end in group for group in joint):
            continue
        carried = sum(
            _passes_through(state, add.node, closer, reach)
            for state, add in zip(chain.states, chain.adds, strict=False)
        )
        if carried * 2 < len(chain.adds):
            reasons[index] = _STAR if len(chain.adds) == 1 else _LEFT_BEHIND
    return reasons


_STAR = "adds one value again and again, which no later layer carries on (a mask or a bias)"
_LEFT_BEHIND = "most of its states are also used past the next one: a recurrence, or a weighted sum of all of them"


def _leaking(stars: Sequence[Chain], reach: Reachability) -> list[Chain]:
    """Of the stars, those that exchange updates: with no stream beside them they are streams that leak."""
    return [stars[index] for index in _exchanging(stars, reach, ())]


def _post_dominators(chains: Sequence[Chain], reach: Reachability) -> dict[fx.Node, fx.Node]:
    """Map each node to the nearest one that all its ways to the outputs pass; returned states do not count."""
    states = {state for chain in chains for state in chain.states[:-1]}
    backwards: nx.DiGraph = nx.DiGraph()
    output = reach.nodes[-1]
    for node in reach.nodes:
        for source in value_inputs(node):
            if node is output and stream_root(source) in states:
                continue
            backwards.add_edge(node, source)
    return nx.immediate_dominators(backwards, output)


def _passes_through(state: fx.Node, add: fx.Node, closer: dict[fx.Node, fx.Node], reach: Reachability) -> bool:
    node = state
    while node in closer and reach.position[node] < reach.position[add]:
        following = closer[node]
        if following is node:
            return False
        node = following
    return node is add


def _nested(chains: Sequence[Chain], reach: Reachability, _: Sequence[Group]) -> Reasons:
    """A chain that starts from another's stream and only feeds back into it lies in a branch of it."""
    if len(chains) < 2:
        return {}
    closer = _post_dominators(chains, reach)

    def lies_inside(inner: Chain, outer: Chain) -> bool:
        if not _feeds_later(inner, outer, reach):
            return False
        if inner.root is not outer.root and reach.reaches(outer.root, inner.root):
            return not _feeds_later(outer, inner, reach)
        # an encoder may share its root with its decoder, but it is read by more than one branch; and what starts from
        # a parameter lies inside when the stream is read in it, and when it began before one update and ended in it
        if not reach.reaches(outer.root, inner.end):
            return False
        first, entry = (_first_reached(state, outer, reach) for state in (inner.adds[0].node, inner.end))
        return entry is not None and first is entry and _passes_through(inner.end, entry, closer, reach)

    return _pairwise(chains, lies_inside, "lies inside one branch of a stream")


def _first_reached(state: fx.Node, chain: Chain, reach: Reachability) -> fx.Node | None:
    return next((add.node for add in chain.adds if reach.reaches(state, add.node)), None)


def _exchanging(chains: Sequence[Chain], reach: Reachability, joint: Sequence[Group]) -> Reasons:
    """Streams that feed each other, but for those of one group that is still complete."""
    ends = {chain.end for chain in chains}
    group_of = {end: number for number, group in enumerate(joint) if group <= ends for end in group}

    def exchange(one: Chain, other: Chain) -> bool:
        side_by_side = one.end in group_of and group_of[one.end] == group_of.get(other.end)
        return not side_by_side and _exchange(one, other, reach)

    return _pairwise(chains, exchange, "belongs to one of several streams that exchange updates")


def _exchange(one: Chain, other: Chain, reach: Reachability) -> bool:
    return _feeds_later(one, other, reach) and _feeds_later(other, one, reach)


def _pairwise(chains: Sequence[Chain], test: Callable[[Chain, Chain], bool], reason: str) -> Reasons:
    return {
        index: reason
        for index, chain in enumerate(chains)
        if any(other is not chain and test(chain, other) for other in chains)
    }


def _feeds_later(source: Chain, target: Chain, reach: Reachability) -> bool:
    """Say whether an add of `source` reaches an update of `target` that its root does not know yet."""
    adds = 0
    for add in source.adds:
        adds |= reach.bit[add.node]
    own = 0
    for add in target.adds:
        own |= reach.bit[add.node]
    return bool(reach.seen[target.end] & ~reach.seen[target.root] & adds & ~own)


def _cut_by_norm(chains: Sequence[Chain], reach: Reachability, _: Sequence[Group]) -> Reasons:
    cut = post_norm.short_runs(chains, post_norm.links(chains))
    return {
        index: f"the sum passes through {through} before the next update (post-norm)"
        for index, through in cut.items()
        if post_norm.is_norm(through)
    }


def _cut_by_activation(chains: Sequence[Chain], reach: Reachability, _: Sequence[Group]) -> Reasons:
    cut = post_norm.short_runs(chains, post_norm.links(chains))
    return {index: f"the sum passes through {through} before the next update" for index, through in cut.items()}


def _single(chains: Sequence[Chain], reach: Reachability, _: Sequence[Group]) -> Reasons:
    return {
        index: "is the only update of its stream; a stream has two or more"
        for index, chain in enumerate(chains)
        if len(chain.adds) < 2
    }
