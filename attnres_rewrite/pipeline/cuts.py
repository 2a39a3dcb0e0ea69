"""Where a rewritten graph may be cut, and where it should be.

A cut stands in front of a read: what is before it made the state, what is behind it reads. Then only sources cross.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from attnres_rewrite.errors import PartitionError, explain
from attnres_rewrite.fxgraph import module_path, op_name, owner_of
from attnres_rewrite.passes.carriers import VIEWS
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

    Two dynamic programmes over the places, the least time and then the fewest sums within it: O(places^2 * stages).

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
    stops = _Stops((*sums, sums[-1] + last), [0, *(place.num_open for place in places)], allowed, num_stages)
    slowest, _, _ = stops.least(lambda option: option[0])
    # stages of equal layers differ by what rounding leaves
    chosen = stops.least(lambda option: (option[1], option[0]), limit=slowest * (1 + 1e-9))
    return [places[number - 1] for number in chosen[2]]


# the slowest stage, the partial sums that cross, the places of the cuts
_Option = tuple[float, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Stops:
    """What the programme chooses from: `sums[number]` are the seconds before place `number`, counted from 1."""

    sums: Sequence[float]
    num_open: Sequence[int]
    allowed: Sequence[int]
    num_stages: int

    def least(self, rank: Callable[[_Option], Any], limit: float = math.inf) -> _Option:
        """Return the least way to cut in the order of `rank`, with no stage above the limit."""
        best: dict[int, _Option] = {0: (0.0, 0, ())}
        for _ in range(self.num_stages - 1):
            options = {number: self._options(best, number, limit) for number in self.allowed}
            best = {number: min(found, key=rank) for number, found in options.items() if found}
        end = len(self.sums) - 1
        slowest, crossing, cuts = min(self._options(best, end, limit), key=rank)
        return slowest, crossing, cuts[:-1]

    def _options(self, best: Mapping[int, _Option], number: int, limit: float) -> list[_Option]:
        """Extend the ways to cut before earlier places by a stage that ends at this one."""
        crossing = self.num_open[number] if number < len(self.num_open) else 0
        return [
            (max(slowest, seconds), before + crossing, (*cuts, number))
            for start, (slowest, before, cuts) in best.items()
            if start < number and (seconds := self.sums[number] - self.sums[start]) <= limit
        ]


def named_cuts(places: Sequence[Candidate], graph: fx.Graph, names: Sequence[str]) -> list[Candidate]:
    """Return the cuts in front of these modules or reads: each begins a stage.

    Raises:
        PartitionError: No module or read has such a name, it begins no stage, or the names are not in the order of
            the model.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    chosen = [_named_cut(places, graph, name, order) for name in names]
    positions = [order[place.node] for place in chosen]
    if positions != sorted(positions):
        raise PartitionError(f"the cuts {', '.join(names)} are not in the order of the model")
    for name, other, (one, two) in zip(names, names[1:], itertools.pairwise(positions), strict=False):
        if one == two:
            raise PartitionError(f"the cuts {name} and {other} are at the same place: no stage would lie between them")
    return chosen


def _named_cut(places: Sequence[Candidate], graph: fx.Graph, name: str, order: dict[fx.Node, int]) -> Candidate:
    for place in places:
        if place.node.meta["attn_res"] == name:
            return place
    # "" is the model itself
    inside = [node for node in graph.nodes if node.op == "call_function" and name and name in module_path(node)]
    if not inside:
        layers = sorted({owner_of(place.node) for place in places})
        more = " ..." if len(layers) > 8 else ""
        raise PartitionError(
            explain(
                f"no module is called {name or repr(name)}",
                remedy=f"Modules that read the stream: {', '.join(layers[:8])}{more}",
            )
        )
    # a read belongs to the line that adds, which is the module before: this one begins right behind it
    before = [place for place in places if order[place.node] < order[inside[0]]]
    if not before:
        raise PartitionError(
            explain(
                f"{name} begins before the first read of the stream",
                None,
                "The first stage begins there, and would be empty.",
                "Name the modules that begin the second stage and those after it.",
            )
        )
    reads = [place for place in before if _adjacent(place.node, inside[0])]
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
    node, name = read.next, read.meta["attn_res"]
    # a gate is part of the read, and so is what moves its channels back and lays them out
    while node.op != "call_function" or node.meta.get("gate_of") == name or _is_laid_out(read, node):
        if node is first:
            return True
        node = node.next
    return node is first


def _is_laid_out(read: fx.Node, node: fx.Node) -> bool:
    while op_name(node) in VIEWS | {"contiguous"} and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node is read
