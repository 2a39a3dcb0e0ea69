"""attnres-rewrite inspect: a model -> its streams, blocks, reads, and the adds left alone; changes nothing."""

from typing import Annotated

import typer

import attnres_rewrite as ar
from attnres_rewrite.cli import options, render
from attnres_rewrite.cli.rewriting import reported

AllAdds = Annotated[bool, typer.Option("--all-adds", help="List every add that was left alone.")]
EXAMPLES = (
    "inspect examples/gpt.py",
    "inspect examples/gpt.py:build --blocks 4 --all-adds",
    "inspect examples/kimi_linear_48b --meta --block-size 6",
    "inspect my_package.models:make_vit --json",
)


@options.plans()
def inspect(
    model: options.Model,
    config: "ar.AttnResConfig",
    meta: options.Meta = False,
    batch: options.Batch = None,
    seq: options.Seq = None,
    device: options.Device = None,
    all_adds: AllAdds = False,
    as_json: options.AsJson = False,
) -> None:
    """Show the streams, the blocks and the reads of MODEL. Changes nothing.

    Exit status: 0 found, 1 refused with a reason, 2 wrong arguments.
    """
    found = options.load_model(model, config, meta, batch, seq, device)
    with render.working("capture") as stage:
        report = reported(found, config, stage)
    if as_json:
        render.facts(report.to_dict())
        return
    render.report(report, all_adds=all_adds)
