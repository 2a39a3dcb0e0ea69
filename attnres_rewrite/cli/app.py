"""attnres-rewrite: read the arguments, call the library, print what it says.

inspect   MODEL -> streams, blocks, reads, and the adds left alone; changes nothing
rewrite   MODEL -> the same, the proofs, and a saved folder
verify    MODEL -> the proofs' figures
partition MODEL -> the stages of a pipeline and their traffic
diagnose  MODEL, data -> weights, magnitudes and gradients, as tables, JSON and plots
report    MODEL -> one HTML page about its rewrite

Facts go to stdout; progress, notes and refusals to stderr. Exit status: 0 done, 1 refused with a reason,
2 wrong arguments. Every failure ends in `run`, so the commands are straight lines.
"""

import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import attnres_rewrite as ar
from attnres_rewrite.cli import load, render
from attnres_rewrite.cli.targets import refuse_existing
from attnres_rewrite.errors import AlreadyRewrittenError, ProofError, RewriteError, explain

MODEL_HELP = (
    "FILE.py[:factory], package.module:factory, a Hugging Face folder, X.pt2, or a saved rewrite. "
    "A factory takes no arguments and returns a module, or (module, args), or (module, args, kwargs)."
)
WARNING = (
    "Naming a FILE.py or a module runs its code. Loading a .pt2 can run code as well: torch unpickles what "
    "the file holds. Use only files that you trust. Hugging Face folders and saved rewrites are data: "
    "their code is never run and nothing is unpickled."
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Blocks = Annotated[
    str | None,
    typer.Option(metavar="N|full", help="Blocks of each stream; full is one update a block. Default 8."),
]
BlockSize = Annotated[int | None, typer.Option(metavar="S", help="Updates a block, instead of --blocks.")]
BlockLayers = Annotated[int | None, typer.Option(metavar="N", help="Layers a block, instead of --blocks.")]
Output = Annotated[
    str,
    typer.Option(
        metavar="sum|mean",
        help="sum: at zero queries exactly the original. mean: the paper to the letter.",
    ),
]
Schedule = Annotated[str, typer.Option(metavar="auto|direct|two_phase", help="The order in which reads are computed.")]
NoKeyNorm = Annotated[bool, typer.Option("--no-key-norm", help="No learned gain on the normalised keys.")]
Heads = Annotated[int, typer.Option(metavar="H", help="Heads of each read, groups of channels that mix alone.")]
KeyRank = Annotated[int | None, typer.Option(metavar="R", help="Keys are the last R channels. Not with --heads.")]
Gate = Annotated[bool, typer.Option("--gate", help="Add reads to the running sum, through gates that start at zero.")]
RecencyBias = Annotated[
    float, typer.Option(metavar="B", help="On the logit of the newest source. Starts as another network unless gated.")
]
Meta = Annotated[
    bool,
    typer.Option("--meta", help="Build a Hugging Face folder from its config.json, with no weights at all."),
]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help=f"Batch of a Hugging Face model's example inputs. Default {load.BATCH}."),
]
Seq = Annotated[
    int | None,
    typer.Option(min=1, help=f"Sequence length of those inputs. Default {load.SEQ}."),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print facts as JSON on stdout, and nothing else. A figure that was not taken is null, one that is not "
        'finite is text: "NaN", "Infinity" or "-Infinity".',
    ),
]
AllAdds = Annotated[bool, typer.Option("--all-adds", help="List every add that was left alone.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Run no proof: the result is unproven.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a rewrite that is there already.")]
OutputPath = Annotated[
    Path | None,
    typer.Option("-o", metavar="PATH", help="Folder to save in. Default: <name>.attnres, here."),
]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


def _epilog(*examples: str) -> str:
    return "\n\n".join(["Examples:", *(f"  attnres-rewrite {line}" for line in examples), WARNING])


def _show_version(wanted: bool) -> None:
    if wanted:
        render.line(f"attnres-rewrite {ar.__version__}, torch {metadata.version('torch')}")
        raise typer.Exit


@app.callback(epilog=WARNING)
def attnres_rewrite(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Rewrite the residual stream of a pre-norm transformer into Attention Residuals, and prove it.

    Exit status: 0 done, 1 refused with a reason, 2 wrong arguments.
    """


@app.command(
    epilog=_epilog(
        "inspect examples/gpt.py",
        "inspect examples/gpt.py:build --blocks 4 --all-adds",
        "inspect examples/kimi_linear_48b --meta --block-size 6",
        "inspect my_package.models:make_vit --json",
    )
)
def inspect(
    model: Model,
    blocks: Blocks = None,
    block_size: BlockSize = None,
    block_layers: BlockLayers = None,
    output: Output = "sum",
    schedule: Schedule = "auto",
    no_key_norm: NoKeyNorm = False,
    heads: Heads = 1,
    key_rank: KeyRank = None,
    gate: Gate = False,
    recency_bias: RecencyBias = 0.0,
    meta: Meta = False,
    batch: Batch = None,
    seq: Seq = None,
    all_adds: AllAdds = False,
    as_json: AsJson = False,
) -> None:
    """Show the streams, the blocks and the reads of MODEL. Changes nothing.

    Exit status: 0 found, 1 refused with a reason, 2 wrong arguments.
    """
    variant = heads, key_rank, gate, recency_bias
    config = _config(blocks, block_size, block_layers, output, schedule, no_key_norm, *variant)
    found = _load(model, config, meta, batch, seq)
    if load.is_artifact(model):
        report = found.model.report
    else:
        with render.working("capture") as stage:
            report = ar.inspect(found.model, found.args, found.kwargs, config, progress=stage)
    if as_json:
        render.facts(report.to_dict())
        return
    render.report(report, all_adds=all_adds)


@app.command(
    epilog=_epilog(
        "rewrite examples/gpt.py",
        "rewrite ./Qwen3-0.6B --blocks 8 -o qwen3.attnres",
        "rewrite exported.pt2 --blocks full --output mean --force",
    )
)
def rewrite(
    model: Model,
    blocks: Blocks = None,
    block_size: BlockSize = None,
    block_layers: BlockLayers = None,
    output: Output = "sum",
    schedule: Schedule = "auto",
    no_key_norm: NoKeyNorm = False,
    heads: Heads = 1,
    key_rank: KeyRank = None,
    gate: Gate = False,
    recency_bias: RecencyBias = 0.0,
    meta: Meta = False,
    batch: Batch = None,
    seq: Seq = None,
    no_verify: NoVerify = False,
    path: OutputPath = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Rewrite MODEL, prove that it still computes what it did, and save the result.

    Exit status: 0 saved, 1 refused with a reason or not proven, 2 wrong arguments.
    """
    variant = heads, key_rank, gate, recency_bias
    config = _config(blocks, block_size, block_layers, output, schedule, no_key_norm, *variant)
    _refuse_meta(meta, "rewrite")
    target = path or Path(f"{load.name_of(model)}.attnres")
    refuse_existing(target, force)
    _refuse_artifact(model)
    found = _load(model, config, meta, batch, seq)
    with render.working("capture") as stage:
        new = ar.rewrite(found.model, found.args, found.kwargs, config, verify=not no_verify, progress=stage)
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


@app.command(
    epilog=_epilog(
        "verify gpt.attnres",
        "verify examples/gpt.py --blocks full",
        "verify ./Qwen3-0.6B --json",
    )
)
def verify(
    model: Model,
    blocks: Blocks = None,
    block_size: BlockSize = None,
    block_layers: BlockLayers = None,
    output: Output = "sum",
    schedule: Schedule = "auto",
    no_key_norm: NoKeyNorm = False,
    heads: Heads = 1,
    key_rank: KeyRank = None,
    gate: Gate = False,
    recency_bias: RecencyBias = 0.0,
    meta: Meta = False,
    batch: Batch = None,
    seq: Seq = None,
    as_json: AsJson = False,
) -> None:
    """Prove a saved rewrite again, or rewrite MODEL in memory and prove that. Saves nothing.

    Exit status: 0 proven, 1 refused with a reason or not proven, 2 wrong arguments.
    """
    variant = heads, key_rank, gate, recency_bias
    config = _config(blocks, block_size, block_layers, output, schedule, no_key_norm, *variant)
    _refuse_meta(meta, "verify")
    found = _load(model, config, meta, batch, seq)
    with render.working("capture") as stage:
        if load.is_artifact(model):
            new = found.model
            figures = ar.verify(new, progress=stage)
        else:
            new = ar.rewrite(found.model, found.args, found.kwargs, config, progress=stage)
            figures = new.report.verify
    assert figures is not None
    failure = None if figures.passed else ProofError(explain(f"{model} is not proven", why=_failed(figures)))
    if as_json:
        render.facts({"model": new.report.model, **figures.to_dict()} | render.error_facts(failure))
    else:
        render.proofs(figures)
        if failure is not None:
            render.problem(failure, as_json=False)
    if failure is not None:
        raise typer.Exit(1)


def _config(
    blocks: str | None,
    block_size: int | None,
    block_layers: int | None,
    output: str,
    schedule: str,
    no_key_norm: bool,
    heads: int = 1,
    key_rank: int | None = None,
    gate: bool = False,
    recency_bias: float = 0.0,
) -> "ar.AttnResConfig":
    return ar.AttnResConfig(
        num_blocks=_count_or_full(blocks),
        block_size=block_size,
        block_layers=block_layers,
        output=output,  # pyright: ignore[reportArgumentType]  # AttnResConfig checks it
        schedule=schedule,  # pyright: ignore[reportArgumentType]
        key_norm=not no_key_norm,
        num_heads=heads,
        key_rank=key_rank,
        gate=gate,
        recency_bias=recency_bias,
    )


def _count_or_full(blocks: str | None) -> int | str | None:
    if blocks is None or blocks == "full":
        return blocks
    try:
        return int(blocks)
    except ValueError:
        raise ValueError(f"--blocks {blocks} must be a count or full") from None


def _load(model: str, config: "ar.AttnResConfig", meta: bool, batch: int | None, seq: int | None) -> load.Loaded:
    if load.is_artifact(model) and config != ar.AttnResConfig():
        raise ValueError(f"{model} is a rewrite already: the options that plan one do not apply to it")
    with render.working("load the model"):
        found = load.load(model, meta=meta, batch=batch, seq=seq)
    for text in found.notes:
        render.warning(text)
    return found


def _refuse_artifact(model: str) -> None:
    if load.is_artifact(model):
        raise AlreadyRewrittenError(
            explain(f"{model} is a rewrite already", remedy="Rewrite the model that it was made from.")
        )


def _refuse_meta(meta: bool, command: str) -> None:
    if meta:
        raise ValueError(
            f"--meta builds tensors without data, so {command} could neither prove nor save anything: "
            "only inspect takes it"
        )


def _failed(figures: "ar.VerifyReport") -> str:
    failed = [f"{proof.name} ({proof.mode})" for proof in figures.proofs if not proof.passed]
    return f"failed: {', '.join(failed)}" if failed else "no proof could be run"


_USAGE_ERROR = typer.BadParameter.__bases__[0]


def exit_code_of(problem: Exception) -> int | None:
    """Return the exit status that `problem` stands for, or None for a bug."""
    if isinstance(problem, RewriteError):
        return 1
    if isinstance(problem, _USAGE_ERROR):
        return 2
    if isinstance(problem, ValueError | TypeError) and _raised_here(problem):
        return 2
    return None


def _raised_here(problem: Exception) -> bool:
    """Say whether our own code raised: a ValueError from deep in torch is no wrong argument."""
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = Path(__file__).parents[1]
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(package)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status."""
    as_json = "--json" in arguments
    try:
        return app(args=list(arguments), prog_name="attnres-rewrite", standalone_mode=False) or 0
    except Exception as problem:
        code = exit_code_of(problem)
        if code is not None or as_json:
            render.problem(problem, as_json=as_json)
        if code is None:
            raise
        return code


def main() -> NoReturn:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))


# commands with a file of their own: they take the options above
from attnres_rewrite.cli import diagnose, partition, report  # noqa: E402, F401  # pyright: ignore[reportUnusedImport]
