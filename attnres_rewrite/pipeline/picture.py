"""A plan -> a picture: when each rank runs what, and which block is where.

matplotlib is the extra "plot"; it is imported when something is drawn.
"""

from typing import TYPE_CHECKING

from attnres_rewrite.pipeline.plan import PipelinePlan
from attnres_rewrite.pipeline.schedules import facts_of
from attnres_rewrite.pipeline.timeline import bubble, timeline
from attnres_rewrite.plots import STYLE, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# of the palette of Okabe and Ito, which colour-blind readers can tell apart
COLOURS = {"F": "#56B4E9", "B": "#E69F00", "I": "#F0E442", "W": "#009E73"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
# of a value at a stage: how it came there
STATES = {"made": "#0072B2", "received": "#D55E00", "from the store": "#009E73", "passed on": "#BBBBBB"}
WIDTH_IN = 7.0
NUMBERED_RUNS = 160  # more boxes than these carry no number of their microbatch


def draw_pipeline(plan: PipelinePlan, schedule: str = "Interleaved1F1B", n_microbatches: int | None = None) -> "Figure":
    """Draw the schedule of a plan over time, by the estimated seconds of its stages, and where each value travels.

    Args:
        plan: Of `partition`.
        schedule: One that fits the plan; see `build_pipeline`.
        n_microbatches: Of one step; None is twice the number of stages.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: The schedule does not fit the plan, or the number of microbatches does not fit the schedule.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    facts_of(schedule)
    rows = max(len(plan.values), 1)
    heights = [0.6 + 0.28 * plan.num_ranks, 0.7 + 0.16 * rows]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, sum(heights) + 0.5), layout="constrained")
        time, place = figure.subplots(2, 1, height_ratios=heights)
        _draw_timeline(time, plan, schedule, n_microbatches or 2 * len(plan.stages))
        _draw_values(place, plan)
    return figure


def _draw_timeline(axes: "Axes", plan: PipelinePlan, schedule: str, n_microbatches: int) -> None:
    from matplotlib.patches import Patch

    runs = timeline(plan, schedule, n_microbatches)
    numbered = len(runs) <= NUMBERED_RUNS
    for run in runs:
        # later stages of a rank are drawn lighter
        turn = run.stage // plan.num_ranks
        axes.barh(
            run.rank,
            (run.end - run.start) * 1e3,
            left=run.start * 1e3,
            height=0.8,
            color=COLOURS[run.kind],
            alpha=1 - 0.5 * turn / max(plan.num_virtual, 1),
            edgecolor="black",
            linewidth=0.3,
        )
        if numbered:
            axes.text((run.start + run.end) * 500, run.rank, str(run.microbatch), ha="center", va="center", fontsize=5)
    kinds = [kind for kind in COLOURS if any(run.kind == kind for run in runs)]
    axes.legend(
        handles=[Patch(facecolor=COLOURS[kind], edgecolor="black", label=NAMES[kind]) for kind in kinds],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
    )
    axes.set_yticks(range(plan.num_ranks), [f"rank {rank}" for rank in range(plan.num_ranks)])
    axes.invert_yaxis()
    axes.set_xlabel("ms, estimated")
    axes.set_title(
        f"{schedule}, {n_microbatches} microbatches: ranks wait {bubble(runs, plan.num_ranks):.0%} of the time; "
        "later stages are lighter"
    )


def _draw_values(axes: "Axes", plan: PipelinePlan) -> None:
    from matplotlib.patches import Patch

    for row, value in enumerate(plan.values):
        for routes in plan.routes:
            state = _state(value.name, value.readers, routes.stage, plan)
            if state is not None:
                axes.barh(row, 0.9, left=routes.stage - 0.45, height=0.8, color=STATES[state])
    count = len(plan.stages)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_xticks(range(count), [f"{routes.stage}\nrank {routes.rank}" for routes in plan.routes])
    axes.set_yticks(range(len(plan.values)), [value.label or value.name for value in plan.values])
    axes.invert_yaxis()
    axes.set_xlabel("stage")
    traffic = plan.traffic[plan.mode]
    axes.set_title(
        f"what travels where ({plan.mode}): {traffic.total_units} tensors, {traffic.total_bytes / 2**20:,.1f} MiB a "
        "microbatch, forward"
    )
    axes.legend(
        handles=[Patch(facecolor=colour, label=state) for state, colour in STATES.items()],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
    )


def _state(name: str, readers: frozenset[int], stage: int, plan: PipelinePlan) -> str | None:
    """Say how a value came to a stage, or None where it is not."""
    routes = plan.routes[stage]
    if name in routes.made:
        return "made"
    if name in routes.cached:
        return "from the store"
    if name in routes.received:
        return "received" if stage in readers else "passed on"
    return "passed on" if name in routes.sent else None
