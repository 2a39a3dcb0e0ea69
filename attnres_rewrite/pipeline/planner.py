"""Who makes, holds, needs and relays each value that crosses the cuts of a pipeline, and what that costs.

Stages are numbered in the order of the model, 0 to C-1, C = P ranks times V virtual stages. Only neighbours talk, stage
to next stage; torch.distributed.pipelining has no other way. A value made in one stage and read in several later ones
travels along, hop by hop, and a rank that holds a copy already may read it there instead:

naive   no rank keeps anything: a value is carried to every stage up to its last reader
paper   a rank keeps what it received for an earlier stage of its own (arXiv 2603.15031, section 4.2)
exact   a rank keeps what it made, too: with neighbours only, nothing carries less

    P = 2, V = 2, a block made in stage 0 and read in 1, 2, 3; stages 0 and 2 are on rank 0
    naive  0 > 1 > 2 > 3      paper  0 > 1 > 2, 3 from the store of rank 1      exact  0 > 1, 2 and 3 from their stores
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Mode = Literal["naive", "paper", "exact"]
Placement = Literal["loop", "v"]
MODES: tuple[Mode, ...] = ("naive", "paper", "exact")


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that crosses a cut: made in one stage, read in later ones.

    Attributes:
        name: Of its node.
        made: The stage that computes it.
        readers: Later stages that read it.
        num_bytes: Of one microbatch.
        has_gradient: Something trainable feeds it.
        label: What it is to the reads: "embedding", "block 2", "partial sum of block 3"; "" when they do not mix it.
    """

    name: str
    made: int
    readers: frozenset[int]
    num_bytes: int
    has_gradient: bool = True
    label: str = ""


@dataclass(frozen=True, slots=True)
class StageRoutes:
    """What one stage takes, reads from its rank's store, sends on and leaves in the store; names of values.

    Attributes:
        stage: Its number.
        rank: The process that runs it.
        received: Over the hop from the stage before, in the order of the wire.
        cached: Read from the store of the rank.
        made: Computed here.
        sent: Over the hop to the next stage, in the order of the wire.
        kept: Left in the store.
        dropped: (value, owner) whose last use on this rank is here.
        owners: For a value at hand, which stage of this rank brought it there: this one, when it was made or received
            here.
        deposits: For each value made or received here, how many gradients later stages of this rank hand in for it.
    """

    stage: int
    rank: int
    received: tuple[str, ...]
    cached: tuple[str, ...]
    made: tuple[str, ...]
    sent: tuple[str, ...]
    kept: tuple[str, ...]
    dropped: tuple[tuple[str, int], ...]
    owners: Mapping[str, int]
    deposits: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What crosses between ranks for one microbatch, forward; the backward moves the gradients of the same values.

    Attributes:
        mode: What ranks keep.
        per_hop_units: Values over the hop from stage c to c + 1; 0 where both are on one rank.
        per_hop_bytes: The bytes of those.
        held_bytes: The most that each rank holds in its store at once.
    """

    mode: Mode
    per_hop_units: tuple[int, ...]
    per_hop_bytes: tuple[int, ...]
    held_bytes: tuple[int, ...]

    @property
    def total_units(self) -> int:
        """Values over all hops."""
        return sum(self.per_hop_units)

    @property
    def total_bytes(self) -> int:
        """Bytes over all hops."""
        return sum(self.per_hop_bytes)


def ranks_of_stages(num_ranks: int, num_virtual: int, placement: Placement) -> tuple[int, ...]:
    """Return the rank of each stage: 0 1 2 0 1 2 as a loop, 0 1 2 2 1 0 as a V.

    Raises:
        ValueError: A count is below 1, or the placement is unknown.
    """
    if num_ranks < 1 or num_virtual < 1:
        raise ValueError(f"{num_ranks} ranks with {num_virtual} stages each: both must be at least 1")
    if placement == "loop":
        return tuple(range(num_ranks)) * num_virtual
    if placement != "v":
        raise ValueError(f"placement={placement!r} must be 'loop' or 'v'")
    there, back = tuple(range(num_ranks)), tuple(reversed(range(num_ranks)))
    return tuple(rank for turn in range(num_virtual) for rank in (back if turn % 2 else there))


def plan_routes(values: Sequence[Value], ranks: Sequence[int], mode: Mode) -> tuple[StageRoutes, ...]:
    """Route every value; the order of `values` is the order on the wire.

    Raises:
        ValueError: The mode is unknown, or a value is read before it is made.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {', '.join(map(repr, MODES))}")
    routes = [_route(value, ranks, mode) for value in values if value.readers]
    return tuple(_stage_routes(stage, rank, routes) for stage, rank in enumerate(ranks))


def traffic_of(values: Sequence[Value], ranks: Sequence[int], mode: Mode) -> Traffic:
    """Count what a mode carries and holds."""
    sizes = {value.name: value.num_bytes for value in values}
    stages = plan_routes(values, ranks, mode)
    crossing = [stage.sent if ranks[number] != ranks[number + 1] else () for number, stage in enumerate(stages[:-1])]
    return Traffic(
        mode,
        tuple(len(names) for names in crossing),
        tuple(sum(sizes[name] for name in names) for names in crossing),
        tuple(_most_held(stages, rank, sizes) for rank in range(max(ranks) + 1)),
    )


@dataclass(frozen=True, slots=True)
class _Route:
    """The way of one value. `supplier` maps a stage that reads its rank's store to the stage that put it there."""

    value: Value
    received: frozenset[int]  # stages that get it over the hop before them
    supplier: Mapping[int, int]

    @property
    def at_hand(self) -> Iterator[int]:
        yield from sorted({self.value.made, *self.received, *self.supplier})

    def owner(self, stage: int) -> int:
        return self.supplier.get(stage, stage)

    def deposits(self, owner: int) -> int:
        """Count the gradients that stages of this rank hand in for the copy that `owner` made or received.

        One for each stage that reads the stored copy, one for each that sends it on; the maker's own send, and the
        receiver's own reading, are part of what autograd does there.
        """
        using = [stage for stage, supplier in self.supplier.items() if supplier == owner]
        count = sum((stage in self.value.readers) + (stage + 1 in self.received) for stage in using)
        return count + (owner != self.value.made and owner + 1 in self.received)


def _route(value: Value, ranks: Sequence[int], mode: Mode) -> _Route:
    if min(value.readers) <= value.made or max(value.readers) >= len(ranks):
        raise ValueError(f"{value.name} is made in stage {value.made} and read in {sorted(value.readers)}")
    last = max(value.readers)
    received: set[int] = set()
    supplier: dict[int, int] = {}
    for stage in range(value.made + 1, last + 1):
        holder = _holder(value, stage, ranks, mode, received)
        if holder is None:
            received.add(stage)
        else:
            supplier[stage] = holder
    needed = set(value.readers)
    for stage in range(last, value.made, -1):
        if stage in needed:
            needed.add(supplier.get(stage, stage - 1))
    return _Route(
        value, frozenset(received & needed), {stage: supplier[stage] for stage in supplier if stage in needed}
    )


def _holder(value: Value, stage: int, ranks: Sequence[int], mode: Mode, received: Iterable[int]) -> int | None:
    """Return the earliest stage on the rank of `stage` that brought the value there and may keep it, or None."""
    if mode == "naive":
        return None
    brought = {value.made, *received} if mode == "exact" else set(received)
    # a neighbour on the same rank hands over what it has: that is no hop between ranks
    here = [earlier for earlier in sorted(brought) if ranks[earlier] == ranks[stage] and earlier != stage - 1]
    return here[0] if here else None


def _stage_routes(stage: int, rank: int, routes: Sequence[_Route]) -> StageRoutes:
    at_hand = [route for route in routes if stage in set(route.at_hand)]
    own = [route for route in at_hand if route.owner(stage) == stage]
    last_uses = [
        (route.value.name, owner)
        for route in at_hand
        for owner in {route.owner(stage)} - {stage}
        if stage == max(user for user, supplier in route.supplier.items() if supplier == owner)
    ]
    return StageRoutes(
        stage=stage,
        rank=rank,
        received=tuple(route.value.name for route in routes if stage in route.received),
        cached=tuple(route.value.name for route in at_hand if stage in route.supplier and stage in route.value.readers),
        made=tuple(route.value.name for route in routes if route.value.made == stage),
        sent=tuple(route.value.name for route in routes if stage + 1 in route.received),
        kept=tuple(route.value.name for route in own if stage in route.supplier.values()),
        dropped=tuple(last_uses),
        owners={route.value.name: route.owner(stage) for route in at_hand},
        deposits={route.value.name: route.deposits(stage) if route.value.has_gradient else 0 for route in own},
    )


def _most_held(stages: Sequence[StageRoutes], rank: int, sizes: Mapping[str, int]) -> int:
    held = most = 0
    for stage in stages:
        if stage.rank == rank:
            held += sum(sizes[name] for name in stage.kept)
            most = max(most, held)
            held -= sum(sizes[name] for name, _ in stage.dropped)
    return most
