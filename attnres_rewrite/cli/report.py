"""attnres-rewrite report: a model, or a saved rewrite -> one self-contained HTML page about it."""

from pathlib import Path
from typing import Annotated

import typer

import attnres_rewrite as ar
from attnres_rewrite.cli import load, options, render
from attnres_rewrite.cli.rewriting import rewritten
from attnres_rewrite.cli.targets import model_file, refuse_same_file, refuse_unwritable_file
from attnres_rewrite.errors import ArtifactError, explain

DiagnosisPath = Annotated[
    Path | None,
    typer.Option("--diagnosis", metavar="FILE", help="What diagnose wrote for MODEL, diagnosis.json: adds its plots."),
]
PagePath = Annotated[Path | None, typer.Option("-o", metavar="PATH", help="File to write. Default: <name>.html, here.")]
SUFFIXES = (".html", ".htm")
ForceFile = Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")]
EXAMPLES = (
    "report examples/gpt.py -o gpt.html",
    "report gpt.attnres --diagnosis gpt.diagnosis/diagnosis.json --force",
    "report examples/kimi_linear_48b --meta --block-size 6",
)


@options.plans()
def report(
    model: options.Model,
    config: "ar.AttnResConfig",
    meta: options.Meta = False,
    batch: options.Batch = None,
    seq: options.Seq = None,
    device: options.Device = None,
    no_verify: options.NoVerify = False,
    diagnosis: DiagnosisPath = None,
    path: PagePath = None,
    force: ForceFile = False,
    as_json: options.AsJson = False,
) -> None:
    """Write one HTML page: what is found in MODEL, the proofs, a layer before and after, the schedule, a forecast.

    MODEL is rewritten in memory, and proven. A saved rewrite is shown as it was saved. The page needs no network.

    Exit status: 0 written, 1 refused with a reason or not proven, 2 wrong arguments.
    """
    target = path or Path(f"{load.name_of(model)}.html")
    refuse_same_file({"-o": target}, {"MODEL": model_file(model), "--diagnosis": diagnosis})
    if target.suffix not in SUFFIXES and not target.is_dir():
        raise ValueError(f"-o {target} must end in {' or '.join(SUFFIXES)}: the page is HTML, which a browser prints")
    refuse_unwritable_file("-o", target, force)
    learnt = None if diagnosis is None else _load_diagnosis(diagnosis)
    found = options.load_model(model, config, meta, batch, seq, device)
    with render.working("capture") as stage:
        # a program of meta tensors never runs, so fixed shapes will do, in half the time
        shapes = {} if any(parameter.is_meta for parameter in found.model.parameters()) else None
        new = rewritten(found, config, stage, verify=not (no_verify or meta), dynamic_shapes=shapes)
        stage("write the page")
        target.write_text(ar.html_report(new, diagnosis=learnt), encoding="utf-8")
    if new.report.verify is None:
        render.warning("NOTHING WAS PROVEN: the page says so.")
    if as_json:
        render.facts(new.report.to_dict() | {"saved": str(target.absolute())})
    else:
        render.line(f"saved  {target.absolute()}")


def _load_diagnosis(path: Path) -> "ar.Diagnosis":
    from attnres_rewrite import plots

    plots.require_matplotlib()
    if path.is_dir():
        raise ValueError(f"--diagnosis {path} is a folder: give the file in it, {path / 'diagnosis.json'}")
    if not path.exists():
        raise ValueError(f"--diagnosis {path}: there is no such file")
    learnt = ar.Diagnosis.load(path)
    if not learnt.streams:
        raise ArtifactError(explain(f"{path} has no figures", None, "No batch of that diagnosis was finite."))
    return learnt
