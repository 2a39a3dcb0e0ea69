"""When each rank runs what, under a schedule of torch: the order is torch's, the durations are the plan's estimates.

A forward takes the seconds of its stage, a backward twice that; a split one once for the inputs and once for the
weights. Sending takes no time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from attnres_rewrite.pipeline.plan import PipelinePlan
from attnres_rewrite.pipeline.schedules import placement_for

KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
DURATIONS = {"F": 1, "B": 2, "I": 1, "W": 1}


@dataclass(frozen=True, slots=True)
class Run:
    """One computation of one stage on one microbatch; times in seconds."""

    rank: int
    stage: int
    microbatch: int
    kind: str  # F forward, B whole backward, I that of the inputs, W that of the weights
    start: float
    end: float


def timeline(plan: PipelinePlan, schedule: str, n_microbatches: int) -> list[Run]:
    """Return the computations of one step in the order in which they start.

    Raises:
        ValueError: The schedule does not fit the plan or the number of microbatches.
    """
    placement = placement_for(schedule, plan.num_virtual)
    if placement != plan.placement:
        raise ValueError(f"{schedule} places stages as a {placement}, the plan as a {plan.placement}")
    count = len(plan.stages)
    if schedule in ("1F1B", "DualPipeV") and n_microbatches < count:
        raise ValueError(f"{schedule} takes at least as many microbatches as stages, {count}, not {n_microbatches}")
    if schedule == "1F1B":
        queues = [_one_forward_one_backward(rank, plan.num_ranks, n_microbatches) for rank in range(plan.num_ranks)]
    else:
        orders = get_schedule_ops(schedule, plan.num_ranks, n_microbatches, plan.num_virtual)
        queues = [list(_computations(order)) for order in orders]
    ends: dict[tuple[str, int, int], float] = {}
    free = [0.0] * plan.num_ranks
    found: list[Run] = []
    while any(queues):
        before = len(found)
        for rank, queue in enumerate(queues):
            while queue and (begin := _earliest(queue[0], ends, count)) is not None:
                kind, stage, microbatch = queue.pop(0)
                start = max(free[rank], begin)
                end = start + DURATIONS[kind] * plan.facts[stage].seconds
                free[rank] = ends[_shared(kind), stage, microbatch] = end
                found.append(Run(rank, stage, microbatch, kind, start, end))
        assert len(found) > before, f"the order of {schedule} cannot run: {[queue[:1] for queue in queues]}"
    return sorted(found, key=lambda run: (run.start, run.rank))


def _one_forward_one_backward(rank: int, num_ranks: int, n_microbatches: int) -> list[tuple[str, int, int]]:
    """Return the order of 1F1B; what torch 2.13 hands out for a picture lacks the first forward of the last rank."""
    ahead = num_ranks - rank
    order = [("F", rank, microbatch) for microbatch in range(min(ahead, n_microbatches))]
    for microbatch in range(n_microbatches):
        order.append(("B", rank, microbatch))
        if microbatch + ahead < n_microbatches:
            order.append(("F", rank, microbatch + ahead))
    return order


def _computations(order: list[Any]) -> Iterator[tuple[str, int, int]]:
    for action in order:
        if action is None:
            continue
        parts = getattr(action, "sub_actions", None) or (action,)
        for part in parts:
            if (kind := KINDS.get(part.computation_type.name)) is not None:
                yield kind, part.stage_index, part.microbatch_index


def _shared(kind: str) -> str:
    """A whole backward and one for the inputs let the stage before go on alike."""
    return "B" if kind == "I" else kind


def _earliest(run: tuple[str, int, int], ends: dict[tuple[str, int, int], float], num_stages: int) -> float | None:
    """Return when all that a computation needs is there; None while something it needs has not run."""
    kind, stage, microbatch = run
    needs = {
        "F": [("F", stage - 1, microbatch)] if stage else [],
        "B": [("F", stage, microbatch), *([("B", stage + 1, microbatch)] if stage < num_stages - 1 else [])],
        "W": [("B", stage, microbatch)],
    }[_shared(kind)]
    return max((ends[need] for need in needs), default=0.0) if all(need in ends for need in needs) else None


def bubble(runs: list[Run], num_ranks: int) -> float:
    """Return the share of the ranks' time in which they wait."""
    length = max(run.end for run in runs)
    return 1 - sum(run.end - run.start for run in runs) / (length * num_ranks) if length else 0.0
