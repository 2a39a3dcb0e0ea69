"""attnres-rewrite rewrite: a model -> a folder with its rewrite, and the proofs."""

from pathlib import Path
from typing import Annotated

import typer

import attnres_rewrite as ar
from attnres_rewrite.cli import load, options, render
from attnres_rewrite.cli.rewriting import rewritten
from attnres_rewrite.cli.targets import refuse_existing
from attnres_rewrite.errors import AlreadyRewrittenError, explain

OutputPath = Annotated[
    Path | None,
    typer.Option("-o", metavar="PATH", help="Folder to save in. Default: <name>.attnres, here."),
]
EXAMPLES = (
    "rewrite examples/gpt.py",
    "rewrite ./Qwen3-0.6B --blocks 8 -o qwen3.attnres",
    "rewrite exported.pt2 --blocks full --output mean --force",
)


@options.plans()
def rewrite(
    model: options.Model,
    config: "ar.AttnResConfig",
    meta: options.Meta = False,
    batch: options.Batch = None,
    seq: options.Seq = None,
    device: options.Device = None,
    no_verify: options.NoVerify = False,
    path: OutputPath = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Rewrite MODEL, prove that it still computes what it did, and save the result.

    Exit status: 0 saved, 1 refused with a reason or not proven, 2 wrong arguments.
    """
    options.refuse_meta(meta, "rewrite")
    target = path or Path(f"{load.name_of(model)}.attnres")
    refuse_existing(target, force)
    _refuse_artifact(model)
    found = options.load_model(model, config, meta, batch, seq, device)
    with render.working("capture") as stage:
        new = rewritten(found, config, stage, verify=not no_verify)
        stage("save")
        saved = ar.save(new, target, force=force)
    if no_verify:
        render.warning("NOTHING WAS PROVEN: --no-verify skipped every proof of this rewrite.")
    if as_json:
        render.facts(new.report.to_dict() | {"saved": str(saved)})
        return
    render.report(new.report)
    render.line("")
    if new.report.verify is not None:
        render.proofs(new.report.verify)
    render.line(f"saved  {saved}")


def _refuse_artifact(model: str) -> None:
    if load.is_artifact(model):
        raise AlreadyRewrittenError(
            explain(f"{model} is a rewrite already", remedy="Rewrite the model that it was made from.")
        )
