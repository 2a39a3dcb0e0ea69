"""Where a rewritten graph may be cut, and where it should be.

A cut stands in front of a read: what is before it made the state, what is behind it reads. Then only sources cross.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from attnres_rewrite.errors import PartitionError, explain
from attnres_rewrite.fxgraph import module_path, owner_of
from attnres_rewrite.pipeline.costs import Device, seconds_of


@dataclass(frozen=True, slots=True)
class Candidate:
    """A place to cut: before `node`, the read of a state. `num_open` partial sums would cross beside the blocks."""

    node: fx.Node
    num_open: int
    seconds: float  # of everything from the candidate before to here


def candidates(graph: fx.Graph, device: Device) -> tuple[tuple[Candidate, ...], float]:
    """Return the places, in the order of the graph, and the seconds of what is behind the last one."""
    found: list[Candidate] = []
    seconds = 0.0
    for node in graph.nodes:
        if "num_finished" in node.meta and node.args:
            sources: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
            found.append(Candidate(node, len(sources) - node.meta["num_finished"], seconds))
            seconds = 0.0
        seconds += seconds_of(node, device)
    return tuple(found), seconds


def source_labels(places: Sequence[Candidate]) -> dict[str, str]:
    """Return what each source of a read is, by the name of its node; streams are numbered where there are several."""
    roots: list[fx.Node] = []
    labels: dict[str, str] = {}
    for place in places:
        sources: Sequence[fx.Node] = place.node.args[0]  # type: ignore[assignment]
        if sources[0] not in roots:
            roots.append(sources[0])
        stream = f"{roots.index(sources[0]) + 1}:"
        for number, source in enumerate(sources):
            is_open = number >= place.node.meta["num_finished"]
            name = f"block {number}" if number else "embedding"
            labels.setdefault(source.name, f"{stream}partial sum of {name}" if is_open else f"{stream}{name}")
    several = len(roots) > 1
    return {node: f"stream {label}".replace(":", ", ") if several else label[2:] for node, label in labels.items()}


def balanced_cuts(
    places: Sequence[Candidate], last: float, num_stages: int, *, at_block_ends: bool = False
) -> list[Candidate]:
    """Choose the cuts whose slowest stage is the fastest; of equal ones, those that fewer partial sums cross.

    A dynamic programme over the places: O(places^2 * stages).

    Args:
        places: Where a cut may be.
        last: Seconds of what is behind the last place.
        num_stages: One more than the cuts.
        at_block_ends: Cut where a block ends, and nowhere else.

    Raises:
        PartitionError: There are fewer places than cuts.
    """
    sums = [0.0]
    for place in places:
        sums.append(sums[-1] + place.seconds)
    allowed = [number for number, place in enumerate(places, start=1) if not (at_block_ends and place.num_open)]
    if len(allowed) < num_stages - 1:
        where = "ends of blocks" if at_block_ends else "reads"
        raise PartitionError(
            explain(
                f"{num_stages} stages need {num_stages - 1} cuts, and there are {len(allowed)} {where} to cut at",
                remedy="Use fewer ranks or virtual stages" + (", or smaller blocks." if at_block_ends else "."),
            )
        )
    # best[number] = (slowest stage, partial sums that cross, cuts) of the part before place `number`, cut there
    best: dict[int, tuple[float, int, tuple[int, ...]]] = {0: (0.0, 0, ())}
    for _ in range(num_stages - 1):
        following: dict[int, tuple[float, int, tuple[int, ...]]] = {}
        for number in allowed:
            options = [
                (max(slowest, sums[number] - sums[start]), crossing + places[number - 1].num_open, (*cuts, number))
                for start, (slowest, crossing, cuts) in best.items()
                if start < number
            ]
            if options:
                following[number] = min(options)
        best = following
    chosen = min(
        (max(slowest, sums[-1] + last - sums[start]), crossing, cuts)
        for start, (slowest, crossing, cuts) in best.items()
    )
    return [places[number - 1] for number in chosen[2]]


def named_cuts(places: Sequence[Candidate], graph: fx.Graph, names: Sequence[str]) -> list[Candidate]:
    """Return the cuts in front of these modules or reads: each begins a stage.

    Raises:
        PartitionError: No module or read has such a name, it begins no stage, or the names are not in the order of
            the model.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    chosen = [_named_cut(places, graph, name, order) for name in names]
    positions = [order[place.node] for place in chosen]
    if positions != sorted(set(positions)):
        raise PartitionError(f"the cuts {', '.join(names)} are not in the order of the model")
    return chosen


def _named_cut(places: Sequence[Candidate], graph: fx.Graph, name: str, order: dict[fx.Node, int]) -> Candidate:
    for place in places:
        if place.node.meta["attn_res"] == name:
            return place
    inside = [node for node in graph.nodes if node.op == "call_function" and name in module_path(node)]
    if not inside:
        layers = sorted({owner_of(place.node) for place in places})
        raise PartitionError(
            explain(f"no module is called {name}", remedy=f"Modules that read the stream: {', '.join(layers[:8])} ...")
        )
    # a read belongs to the line that adds, which is the module before: this one begins right behind it
    reads = [place for place in places if order[place.node] < order[inside[0]] and _adjacent(place.node, inside[0])]
    if not reads:
        raise PartitionError(
            explain(
                f"{name} does not begin with a read of the stream",
                None,
                "A cut in front of it would lie inside a branch.",
                "Name a layer, or a module whose first step is to normalise the stream.",
            )
        )
    return reads[-1]


def _adjacent(read: fx.Node, first: fx.Node) -> bool:
    """Say whether nothing is computed between a read and the first node of a module."""
    node = read.next
    # a gate is part of the read
    while node.op != "call_function" or node.meta.get("gate_of") == read.meta["attn_res"]:
        node = node.next
    return node is first
