"""attnres-rewrite partition: a model -> the stages of a pipeline and their traffic: a table, JSON, a picture."""

from pathlib import Path
from typing import Annotated

import typer

import attnres_rewrite as ar
from attnres_rewrite.cli import options, render
from attnres_rewrite.cli.rewriting import rewritten
from attnres_rewrite.cli.targets import model_file, refuse_same_file, refuse_unwritable_file
from attnres_rewrite.errors import ArtifactError

Ranks = Annotated[int, typer.Option(metavar="P", help="Processes of the pipeline.", show_default=False)]
Virtual = Annotated[int, typer.Option(metavar="V", help="Stages of each process.")]
Cuts = Annotated[
    str,
    typer.Option(
        metavar="balanced|blocks|NAME,NAME..",
        help="balanced: the slowest stage as fast as can be. blocks: the same, at ends of blocks only. Or the modules "
        "or reads that begin the second stage and those after it.",
    ),
]
PipelineSchedule = Annotated[
    str | None,
    typer.Option("--schedule", metavar="NAME", help="Of torch. Default Interleaved1F1B, or 1F1B with one stage."),
]
Mode = Annotated[str, typer.Option(metavar="exact|paper|naive", help="What ranks keep of what they saw.")]
Target = Annotated[Path | None, typer.Option("-o", metavar="PATH", help="File to write the plan to, as JSON.")]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="Picture of the schedule and of what travels where, .svg, .png or .pdf."),
]
Microbatches = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Microbatches in the picture. Default twice the stages.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there already.")]
PICTURES = (".svg", ".png", ".pdf")
EXAMPLES = (
    "partition examples/gpt.py --ranks 2 --virtual 2 --plot gpt.svg",
    "partition hf_folder --ranks 4 --cuts model.layers.3,model.layers.6,model.layers.9",
    "partition examples/kimi_linear_48b --meta --block-size 6 --ranks 8 --virtual 2 --json -o plan.json",
)


@options.plans(without=("schedule",))
def partition(
    model: options.Model,
    ranks: Ranks,
    config: "ar.AttnResConfig",
    virtual: Virtual = 1,
    cuts: Cuts = "balanced",
    pipeline_schedule: PipelineSchedule = None,
    mode: Mode = "exact",
    meta: options.Meta = False,
    batch: options.Batch = None,
    seq: options.Seq = None,
    device: options.Device = None,
    as_json: options.AsJson = False,
    target: Target = None,
    plot: Plot = None,
    microbatches: Microbatches = None,
    force: Force = False,
) -> None:
    """Plan a pipeline: where MODEL is cut, what each stage holds and sends, and the traffic of block caching.

    Sizes are those of one microbatch, --batch and --seq for a Hugging Face model. Nothing runs, and nothing is proven.

    Exit status: 0 planned, 1 refused with a reason, 2 wrong arguments.
    """
    schedule = pipeline_schedule or ("Interleaved1F1B" if virtual > 1 else "1F1B")
    placement = ar.placement_for(schedule, virtual)
    refuse_same_file({"-o": target, "--plot": plot}, {"MODEL": model_file(model)})
    if target is not None:
        refuse_unwritable_file("-o", target, force)
    if microbatches is not None and plot is None:
        raise ValueError("--microbatches is of the picture: give --plot as well")
    if plot is not None:
        _check_plot(plot, force)
    found = options.load_model(model, config, meta, batch, seq, device)
    with render.working("capture") as stage:
        new = rewritten(found, config, stage, verify=False, dynamic_shapes={})
        stage("cut and plan")
        names = cuts if cuts in ("balanced", "blocks") else tuple(cuts.split(","))
        plan = ar.partition(new, ranks, virtual, cuts=names, placement=placement, mode=mode)  # pyright: ignore[reportArgumentType]
    facts = {"model": new.report.model} | plan.to_dict()
    # drawn before anything is written: the number of microbatches may not fit
    figure = None if plot is None else ar.draw_pipeline(plan, schedule, microbatches)
    try:
        if target is not None:
            target.write_text(render.json_text(facts) + "\n")
        if plot is not None and figure is not None:
            figure.savefig(plot, dpi=200)
    except OSError as error:
        raise ArtifactError(f"the plan cannot be written: {error}") from error
    if as_json:
        render.facts(facts)
    else:
        render.pipeline(new.report.model, plan)


def _check_plot(path: Path, force: bool) -> None:
    """Refuse before the work a picture that cannot be drawn or written."""
    from attnres_rewrite.plots import require_matplotlib

    if path.suffix not in PICTURES:
        raise ValueError(f"--plot {path} must end in {', '.join(PICTURES)}")
    refuse_unwritable_file("--plot", path, force)
    require_matplotlib()
