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

import errno
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, NoReturn

import typer

import attnres_rewrite as ar
from attnres_rewrite.cli import diagnose, inspect, partition, render, report, rewrite, verify
from attnres_rewrite.cli.exit_codes import exit_code_of
from attnres_rewrite.cli.options import WARNING, epilog
from attnres_rewrite.errors import ArtifactError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


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


app.command(epilog=epilog(*inspect.EXAMPLES))(inspect.inspect)
app.command(epilog=epilog(*rewrite.EXAMPLES))(rewrite.rewrite)
app.command(epilog=epilog(*verify.EXAMPLES))(verify.verify)
app.command(epilog=epilog(*partition.EXAMPLES))(partition.partition)
app.command(epilog=epilog(*diagnose.EXAMPLES))(diagnose.diagnose)
app.command(epilog=epilog(*report.EXAMPLES))(report.report)


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
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except OSError as problem:
        if problem.errno != errno.ENOSPC:
            raise
        render.problem(ArtifactError(f"the output cannot be written: {problem.strerror}"), as_json=False)
        # Python writes what is left of stdout at its end, and would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
