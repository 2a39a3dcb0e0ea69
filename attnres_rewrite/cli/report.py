"""attnres-rewrite report: a model, or a saved rewrite -> one self-contained HTML page about it."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

import attnres_rewrite as ar
from attnres_rewrite.cli import app as shared
from attnres_rewrite.cli import load, render
from attnres_rewrite.cli.targets import model_file, refuse_same_file
from attnres_rewrite.errors import ArtifactError, explain

DiagnosisPath = Annotated[
    Path | None,
    typer.Option("--diagnosis", metavar="FILE", help="What diagnose wrote for MODEL, diagnosis.json: adds its plots."),
]
PagePath = Annotated[Path | None, typer.Option("-o", metavar="PATH", help="File to write. Default: <name>.html, here.")]
SUFFIXES = (".html", ".htm")
ForceFile = Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")]


@shared.app.command(
    epilog=shared._epilog(
        "report examples/gpt.py -o gpt.html",
        "report gpt.attnres --diagnosis gpt.diagnosis/diagnosis.json --force",
        "report examples/kimi_linear_48b --meta --block-size 6",
    )
)
def report(
    model: shared.Model,
    blocks: shared.Blocks = None,
    block_size: shared.BlockSize = None,
    block_layers: shared.BlockLayers = None,
    output: shared.Output = "sum",
    schedule: shared.Schedule = "auto",
    no_key_norm: shared.NoKeyNorm = False,
    heads: shared.Heads = 1,
    key_rank: shared.KeyRank = None,
    gate: shared.Gate = False,
    recency_bias: shared.RecencyBias = 0.0,
    meta: shared.Meta = False,
    batch: shared.Batch = None,
    seq: shared.Seq = None,
    no_verify: shared.NoVerify = False,
    diagnosis: DiagnosisPath = None,
    path: PagePath = None,
    force: ForceFile = False,
    as_json: shared.AsJson = False,
) -> None:
    """Write one HTML page: what is found in MODEL, the proofs, a layer before and after, the schedule, a forecast.

    MODEL is rewritten in memory, and proven. A saved rewrite is shown as it was saved. The page needs no network.

    Exit status: 0 written, 1 refused with a reason or not proven, 2 wrong arguments.
    """
    variant = heads, key_rank, gate, recency_bias
    config = shared._config(blocks, block_size, block_layers, output, schedule, no_key_norm, *variant)
    target = path or Path(f"{load.name_of(model)}.html")
    refuse_same_file({"-o": target}, {"MODEL": model_file(model), "--diagnosis": diagnosis})
    _check_file(target, force)
    learnt = None if diagnosis is None else _load_diagnosis(diagnosis)
    found = shared._load(model, config, meta, batch, seq)
    with render.working("capture") as stage:
        new = _rewritten(model, found, config, not (no_verify or meta), stage)
        stage("write the page")
        target.write_text(ar.html_report(new, diagnosis=learnt), encoding="utf-8")
    if new.report.verify is None:
        render.warning("NOTHING WAS PROVEN: the page says so.")
    if as_json:
        render.facts(new.report.to_dict() | {"saved": str(target.absolute())})
    else:
        render.line(f"saved  {target.absolute()}")


def _check_file(target: Path, force: bool) -> None:
    """Refuse before the work a file that could not be written, or is not to be.

    Raises:
        ArtifactError: There is a file already and no `force`, or the folder takes no new file.
        ValueError: There is no such folder, or the name is not that of a page.
    """
    if not target.parent.is_dir():
        raise ValueError(f"-o {target}: there is no folder {target.parent}")
    if target.is_dir():
        raise ArtifactError(explain(f"{target} is a folder", remedy="-o names the file to write."))
    if target.suffix not in SUFFIXES:
        raise ValueError(f"-o {target} must end in {' or '.join(SUFFIXES)}: the page is HTML, which a browser prints")
    if target.exists() and not force:
        raise ArtifactError(explain(f"{target} exists", remedy="--force replaces it, -o names another file."))
    try:
        # permissions do not tell: a root user passes them all, and a read-only file system has its own mind
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as why:
        raise ArtifactError(explain(f"{target} cannot be written", None, str(why), "-o names another file.")) from why


def _rewritten(
    model: str, found: load.Loaded, config: "ar.AttnResConfig", proves: bool, stage: render.Stage
) -> "ar.RewrittenModule":
    """Return the rewrite that the page is about: the one that was loaded, or one made now."""
    if load.is_artifact(model):
        return found.model
    # a program of meta tensors never runs, so fixed shapes will do, in half the time
    is_meta = any(parameter.is_meta for parameter in found.model.parameters())
    shapes = {} if is_meta else None
    return ar.rewrite(
        found.model, found.args, found.kwargs, config, dynamic_shapes=shapes, verify=proves, progress=stage
    )


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
