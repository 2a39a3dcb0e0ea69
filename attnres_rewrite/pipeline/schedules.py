"""The schedules of torch.distributed.pipelining: how each places stages on ranks, and how many it takes."""

from dataclasses import dataclass

import torch

from attnres_rewrite.pipeline.planner import Placement


@dataclass(frozen=True, slots=True)
class ScheduleFacts:
    """What a schedule asks of a plan. `num_virtual` None: two or more stages a rank."""

    placement: Placement
    num_virtual: int | None
    splits_backward: bool = False  # into gradients of inputs, and of weights later


SCHEDULES = {
    "GPipe": ScheduleFacts("loop", 1),
    "1F1B": ScheduleFacts("loop", 1),
    "Interleaved1F1B": ScheduleFacts("loop", None),
    "LoopedBFS": ScheduleFacts("loop", None),
    "InterleavedZeroBubble": ScheduleFacts("loop", None, splits_backward=True),
    "ZBVZeroBubble": ScheduleFacts("v", 2, splits_backward=True),
    "DualPipeV": ScheduleFacts("v", 2, splits_backward=True),
}

# older ones add up the gradients of all outputs of an operation, and fail where a stage returns one without a gradient
SPLITS_SINCE = "2.13"


def runs_here(schedule: str) -> bool:
    """Say whether this version of torch runs a schedule right: a split backward needs `SPLITS_SINCE`."""
    # a TorchVersion, which compares by its numbers
    return not facts_of(schedule).splits_backward or torch.__version__ >= SPLITS_SINCE


def facts_of(schedule: str) -> ScheduleFacts:
    """Return what a schedule asks of a plan.

    Raises:
        ValueError: torch has no schedule of this name, or it is none that this package runs.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} must be one of {', '.join(SCHEDULES)}")
    return SCHEDULES[schedule]


def placement_for(schedule: str, num_virtual: int) -> Placement:
    """Return how a schedule places its stages.

    Raises:
        ValueError: The schedule is unknown, or takes another number of stages a rank.
    """
    facts = facts_of(schedule)
    if facts.num_virtual not in (None, num_virtual):
        raise ValueError(f"{schedule} runs {facts.num_virtual} stage(s) on a rank, not {num_virtual}")
    if facts.num_virtual is None and num_virtual < 2:
        raise ValueError(f"{schedule} interleaves two or more stages on a rank, not {num_virtual}; 1F1B takes one")
    return facts.placement
