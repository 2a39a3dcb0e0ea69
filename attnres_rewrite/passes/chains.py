"""Classify adds and link them into chains: steps 1 and 2 of find_stream."""

from dataclasses import dataclass

from torch import fx

from attnres_rewrite.fxgraph import shape_of
from attnres_rewrite.passes.carriers import is_channel_vector, stream_root
from attnres_rewrite.passes.normalize_adds import ADD
from attnres_rewrite.passes.reachability import Reachability
from attnres_rewrite.records import UpdateKind


@dataclass(frozen=True, slots=True)
class StreamAdd:
    """An add that may be on a stream, whose chain starts at `root`; `history` has the bits of its earlier states."""

    node: fx.Node
    stream: fx.Node
    branch: fx.Node
    kind: UpdateKind
    history: int
    root: fx.Node

    @property
    def previous(self) -> fx.Node:
        return stream_root(self.stream)


@dataclass(frozen=True, slots=True)
class Chain:
    """Stream adds, each on the result of the one before."""

    root: fx.Node
    adds: tuple[StreamAdd, ...]

    @property
    def states(self) -> tuple[fx.Node, ...]:
        return (self.root, *(add.node for add in self.adds))

    @property
    def end(self) -> fx.Node:
        return self.adds[-1].node


def classify_adds(reach: Reachability) -> dict[fx.Node, StreamAdd]:
    """Return every add that is on some stream, in graph order."""
    found: dict[fx.Node, StreamAdd] = {}
    for node in reach.operands:
        match = _classify(node, found, reach)
        if match is None:
            continue
        stream, branch, kind = match
        previous = stream_root(stream)
        before = found.get(previous)
        history = (before.history if before else 0) | reach.bit[previous]
        found[node] = StreamAdd(node, stream, branch, kind, history, before.root if before else previous)
    return found


Match = tuple[fx.Node, fx.Node, UpdateKind]  # stream operand, branch operand, kind


def _classify(node: fx.Node, found: dict[fx.Node, StreamAdd], reach: Reachability) -> Match | None:
    operands = reach.operands[node]
    left, right = (operands.left, operands.left_root), (operands.right, operands.right_root)
    full = [side for side in (left, right) if shape_of(side[0]) == shape_of(node)]
    if len(full) == 1:
        (stream, root), (branch, _) = full[0], right if full[0] is left else left
        on_stream = root in found or is_channel_vector(branch, stream)
        return (stream, branch, "inject") if on_stream and not reach.reaches(root, branch) else None
    if left[1] is right[1]:
        return (left[0], right[0], "skip") if left[1] in found else None
    for (stream, root), (branch, branch_root) in ((left, right), (right, left)):
        if reach.reaches(root, branch):
            return _classify_dependent(stream, root, branch, branch_root, found, reach)
        if _reads_before_injection(root, branch, branch_root, stream, found, reach):
            return stream, branch, "residual"
    return _classify_independent(left, right, found, reach)


def _classify_dependent(
    stream: fx.Node,
    root: fx.Node,
    branch: fx.Node,
    branch_root: fx.Node,
    found: dict[fx.Node, StreamAdd],
    reach: Reachability,
) -> Match | None:
    """The branch was computed from the stream operand."""
    if reach.reaches_straight(root, branch):
        # both are on the stream, and the one computed later is the state
        on_stream = branch_root in found or branch_root.target is ADD
        return (branch, stream, "skip") if on_stream else None
    return (stream, branch, "residual") if reach.reaches_mixed(root, branch) else None


def _reads_before_injection(
    root: fx.Node,
    branch: fx.Node,
    branch_root: fx.Node,
    stream: fx.Node,
    found: dict[fx.Node, StreamAdd],
    reach: Reachability,
) -> bool:
    """x' = x + bias;  x' + f(x): the branch reads the state before something was injected."""
    if root not in found or found[root].kind != "inject":
        return False
    read = reach.seen[branch] & found[root].history
    on_stream = reach.straight[branch] & found[root].history
    return bool(read & reach.mixed[branch]) and not on_stream and not reach.reaches_straight(branch_root, stream)


def _classify_independent(
    left: tuple[fx.Node, fx.Node],
    right: tuple[fx.Node, fx.Node],
    found: dict[fx.Node, StreamAdd],
    reach: Reachability,
) -> Match | None:
    """Neither operand reads the other: a parallel branch, or an injection, onto a known stream."""
    choices: list[tuple[tuple[bool, bool, bool, int], fx.Node, fx.Node]] = []
    for (stream, root), (branch, branch_root) in ((left, right), (right, left)):
        if root in found:
            chain = found[root]
            reads = bool((reach.seen[branch] | reach.bit.get(branch, 0)) & chain.history)
            # a chain inside the branch starts from the stream, never the other way round
            starts_first = branch_root not in found or reach.reaches(chain.root, found[branch_root].root)
            # acc = w1 * x1 + w2 * x2 + ...: of two that go on from one state, the one that a layer added to
            is_layer = chain.kind == "residual"
            choices.append(((reads, starts_first, is_layer, chain.history.bit_count()), stream, branch))
    if not choices:
        return None
    (reads, *_), stream, branch = max(choices, key=lambda choice: choice[0])
    return stream, branch, "parallel" if reads else "inject"


def link_chains(found: dict[fx.Node, StreamAdd], reach: Reachability) -> list[Chain]:
    """Split the forest of stream adds into paths, the longest first taken from each root."""
    children: dict[fx.Node, list[fx.Node]] = {}
    for node, add in found.items():
        children.setdefault(add.previous, []).append(node)
    # longest path below a node, counted in adds that read the stream, then in all adds
    depth: dict[fx.Node, tuple[int, int]] = {}
    for node in reversed(found):
        following = _following(children.get(node, []), depth, reach)
        below = depth[following] if following else (0, 0)
        depth[node] = (below[0] + (found[node].kind != "inject"), below[1] + 1)
    starts = [root for root in children if root not in found]
    chains: list[Chain] = []
    while starts:
        root = starts.pop(0)
        path: list[StreamAdd] = []
        node = root
        while (following := _following(children.get(node, []), depth, reach)) is not None:
            children[node].remove(following)
            if children[node]:
                starts.append(node)
            path.append(found[following])
            node = following
        if path:
            chains.append(Chain(root, tuple(path)))
    return chains


def _following(adds: list[fx.Node], depth: dict[fx.Node, tuple[int, int]], reach: Reachability) -> fx.Node | None:
    """Of the adds onto one state, return the one that carries the stream on.

    An add that feeds another one lies in its branch: y = x + g(x);  x' = x + f(norm(y)).
    """
    outer = [add for add in adds if not any(reach.reaches(add, other) for other in adds)]
    return max(outer, key=lambda add: depth[add], default=None)
