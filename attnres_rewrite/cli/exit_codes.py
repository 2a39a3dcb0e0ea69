"""What was raised -> the exit status: 1 a refusal, 2 wrong arguments, None a bug."""

from pathlib import Path

import typer

from attnres_rewrite.errors import RewriteError

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
