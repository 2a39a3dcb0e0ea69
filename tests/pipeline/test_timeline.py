import itertools
from dataclasses import replace

import pytest
import torch

import attnres_rewrite as ar
from attnres_rewrite.pipeline.schedules import SCHEDULES
from attnres_rewrite.pipeline.timeline import DURATIONS, bubble, timeline
from tests.networks import VOCAB, Gpt

ids = torch.arange(16).reshape(2, 8) % VOCAB
MICROBATCHES = 8


@pytest.fixture(scope="module")
def new():
    return ar.rewrite(Gpt(depth=4), (ids,), config=ar.AttnResConfig(num_blocks=4), verify=False, dynamic_shapes={})


def planned(new, schedule, ranks=4):
    """Return a plan whose stages all take a second."""
    virtual = SCHEDULES[schedule].num_virtual or 2
    plan = ar.partition(new, ranks, virtual, placement=ar.placement_for(schedule, virtual))
    return replace(plan, facts=tuple(replace(fact, seconds=1.0) for fact in plan.facts))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_everything_runs_once_and_after_what_it_needs(new, schedule):
    plan = planned(new, schedule)
    runs = timeline(plan, schedule, MICROBATCHES)
    ends = {(run.kind, run.stage, run.microbatch): run.end for run in runs}
    assert len(ends) == len(runs)
    for stage in range(len(plan.stages)):
        for microbatch in range(MICROBATCHES):
            kinds = {kind for kind in DURATIONS if (kind, stage, microbatch) in ends}
            assert kinds in ({"F", "B"}, {"F", "I", "W"})
    for run in runs:
        assert run.rank == plan.routes[run.stage].rank
        assert run.end - run.start == DURATIONS[run.kind]
        if run.kind == "F" and run.stage:
            assert ends["F", run.stage - 1, run.microbatch] <= run.start
    for rank in range(plan.num_ranks):
        own = [run for run in runs if run.rank == rank]
        assert all(one.end <= two.start for one, two in itertools.pairwise(own))


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
@pytest.mark.parametrize("count", [4, 8, 16])
def test_the_bubble_of_one_stage_a_rank(new, schedule, count):
    # (P - 1) / (M + P - 1), arXiv 1811.06965
    assert bubble(timeline(planned(new, schedule), schedule, count), 4) == pytest.approx(3 / (count + 3))


def test_virtual_stages_wait_less(new):
    waits = {name: bubble(timeline(planned(new, name), name, 8), 4) for name in ("1F1B", "Interleaved1F1B")}
    assert waits["Interleaved1F1B"] < waits["1F1B"]


def test_a_schedule_that_does_not_fit(new):
    with pytest.raises(ValueError, match="ZBVZeroBubble places stages as a v, the plan as a loop"):
        timeline(planned(new, "Interleaved1F1B"), "ZBVZeroBubble", 8)


# Once drawn, and an error from within torch; torch does not run it
@pytest.mark.parametrize(("schedule", "stages"), [("1F1B", 4), ("DualPipeV", 8)])
def test_too_few_microbatches(new, schedule, stages):
    with pytest.raises(ValueError, match=f"{schedule} takes at least as many microbatches as stages, {stages}, not 3"):
        timeline(planned(new, schedule), schedule, 3)
