"""Everything that is printed, and the only user of rich. Facts to stdout, the rest to stderr.

Names of modules and files are data, and may hold brackets: every console has markup off.
"""

import json
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from attnres_rewrite.source_lines import place

if TYPE_CHECKING:
    from attnres_rewrite import Diagnosis, PipelinePlan
    from attnres_rewrite.diagnosis import ReadDiagnosis, StreamDiagnosis, UpdateDiagnosis
    from attnres_rewrite.report import CaptureReport, RewriteReport, StreamReport, VerifyReport

Stage = Callable[[str], None]

SPINNER_AFTER_S = 1.0
# Lines in a pipe are for grep: no table is folded to fit a screen that is not there.
PIPE_WIDTH = 10_000
# Weights that differ by less are those of a zero query, and rounding.
ALIKE = 1e-6


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


@contextmanager
def working(first_stage: str) -> Generator[Stage]:
    """Show a spinner with the stage name once the work has lasted a second; yield what names the stage.

    The spinner needs a terminal on stderr. Whatever the model's own code prints goes to stderr too.
    """
    console = _console(stderr=True)
    with redirect_stdout(sys.stderr):
        if not console.is_terminal:
            yield _ignore
            return
        status = console.status(Text(first_stage))
        timer = threading.Timer(SPINNER_AFTER_S, status.start)
        timer.daemon = True
        timer.start()
        try:
            yield lambda stage: status.update(Text(stage))
        finally:
            timer.cancel()
            timer.join()
            status.stop()


def _ignore(stage: str) -> None:
    del stage


@contextmanager
def counting(what: str) -> Generator[Callable[[int, int | None], None]]:
    """Show a progress bar on a terminal's stderr; yield what takes the numbers done and of all. Prints go there."""
    console = _console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    with redirect_stdout(sys.stderr), bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def line(text: str) -> None:
    """Print one line of facts."""
    _console().print(text, soft_wrap=True)


def warning(text: str) -> None:
    """Print what nobody should overlook."""
    _console(stderr=True).print(f"warning: {text}", style="bold yellow", soft_wrap=True)


def facts(values: dict[str, Any]) -> None:
    """Print facts for a program to read."""
    print(json_text(values))


def json_text(values: dict[str, Any]) -> str:
    """Write facts as JSON, which has no number that is not finite: those are "NaN", "Infinity" and "-Infinity"."""
    return json.dumps(_spelled(values), indent=2, allow_nan=False)


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        entries = cast(dict[str, Any], value)
        return {name: _spelled(entry) for name, entry in entries.items()}
    if isinstance(value, list | tuple):
        return [_spelled(entry) for entry in cast(Sequence[Any], value)]
    # null is a figure that was not taken, and this one was; float() and JavaScript's Number() read the spelling
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def error_facts(problem: Exception | None) -> dict[str, Any]:
    """Return an error as JSON-ready values; nothing without an error."""
    if problem is None:
        return {}
    return {"error": {"class": type(problem).__name__, "message": _message(problem)}}


def problem(problem: Exception, *, as_json: bool) -> None:
    """Print why a command did not do what it was asked."""
    if as_json:
        facts(error_facts(problem))
        return
    if show := getattr(problem, "show", None):  # typer's own errors restate the usage
        show()
        return
    kind = "wrong arguments" if isinstance(problem, ValueError | TypeError) else "refused"
    first, _, rest = _message(problem).partition("\n")
    console = _console(stderr=True)
    console.print(Text.assemble((f"{kind}: ", "bold red"), first), soft_wrap=True)
    if rest:
        console.print(rest, soft_wrap=True)


def _message(problem: Exception) -> str:
    show = getattr(problem, "format_message", None)
    return show() if show else str(problem)


def report(report: "RewriteReport", *, all_adds: bool = False) -> None:
    """Print what was found and planned."""
    console = _console()
    console.print(report.model, style="bold", soft_wrap=True)
    console.print(_overview(report))
    for stream in report.streams:
        console.print()
        console.print(_stream_line(stream), soft_wrap=True)
        console.print(f"  {_blocks_line(stream)}", soft_wrap=True)
        console.print(_reads_table(stream))
        console.print(_groups_table(stream))
    console.print()
    _left_alone(console, report, all_adds)


def _overview(report: "RewriteReport") -> Table:
    table = _table("", "", header=False)
    table.add_row("  captured", _capture_text(report.capture))
    if report.capture.fixed_dims:
        fixed = ", ".join(f"{dim.argument}[{dim.dim}] = {dim.size}" for dim in report.capture.fixed_dims)
        table.add_row("  fixed", f"{fixed}: the program takes no other size")
    for note in report.capture.notes:
        table.add_row("  note", note)
    for note in report.notes:
        table.add_row("  note", note)
    table.add_row("  config", _config_text(report.config))
    table.add_row("  added", f"{report.num_parameters_added:,} parameters in {_many(len(report.reads), 'read')}")
    table.add_row("  passes", f"{report.pass_seconds:.2f} s")
    return table


def _capture_text(capture: "CaptureReport") -> str:
    modes = " and ".join(capture.modes)
    return f"{capture.route}, {modes} mode, {capture.num_nodes:,} nodes, {capture.seconds:.1f} s"


def _config_text(config: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.items() if value is not None)


def _stream_line(stream: "StreamReport") -> Text:
    kinds = ", ".join(f"{count} {kind}" for kind, count in stream.update_kinds.items())
    size = f"width {stream.width}, {stream.dtype}, {_many(stream.num_updates, 'update')} ({kinds})"
    return Text.assemble((stream.name, "bold"), f"  {size}")


def _blocks_line(stream: "StreamReport") -> str:
    spans = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in stream.blocks)
    return f"{_many(len(stream.blocks), 'block')} of updates: {spans}; reads run as {stream.runs_as}"


def _reads_table(stream: "StreamReport") -> Table:
    table = _table("  state", "sources", "read by", "add at", "query", "schedule", "in one pass with")
    for read in stream.reads:
        owner = read.owner or "(the model)"
        row = (f"  {read.state}", str(read.num_sources), owner, place(read.source_line), read.query_name)
        table.add_row(*row, read.schedule, ", ".join(read.fused_with) or "-")
    return table


def _groups_table(stream: "StreamReport") -> Table:
    table = _table("  finished sources", "reads", "direct, B/token", "two-phase, B/token", "schedule")
    for group in stream.groups:
        row = (
            f"  {group.num_finished}",
            str(len(group.reads)),
            f"{group.direct_bytes:,}",
            f"{group.two_phase_bytes:,}",
        )
        table.add_row(*row, group.schedule)
    return table


def _left_alone(console: Console, report: "RewriteReport", all_adds: bool) -> None:
    console.print(f"{_many(len(report.left_alone), 'other add')} left alone")
    if all_adds:
        table = _table("  node", "at", "in", "reason")
        for add in report.left_alone:
            table.add_row(f"  {add.node}", place(add.source_line), add.owner or "(the model)", add.reason)
        console.print(table)
        return
    table = _table("", "", header=False)
    for reason, count in Counter(add.reason for add in report.left_alone).most_common():
        table.add_row(f"  {count}", reason)
    console.print(table)


def proofs(figures: "VerifyReport") -> None:
    """Print the figures of every proof."""
    console = _console()
    table = _table("proof", "mode", "dtype", "output error", "gradient error", "limit", "compared", "")
    for proof in figures.proofs:
        gradient = "none" if proof.gradient_error is None else f"{proof.gradient_error:.1e}"
        compared = f"{_many(proof.num_outputs, 'output')}, {_many(proof.num_gradients, 'gradient')}"
        verdict = Text("proven", "bold green") if proof.passed else Text("FAILED", "bold red")
        table.add_row(
            proof.name,
            proof.mode,
            proof.dtype,
            f"{proof.output_error:.1e}",
            gradient,
            f"{proof.limit:.0e}",
            compared,
            verdict,
        )
    console.print(table)
    for text in figures.notes:
        console.print(f"  note: {text}", soft_wrap=True)


def pipeline(model: str, plan: "PipelinePlan") -> None:
    """Print the stages of a plan, and what each mode carries."""
    console = _console()
    stages = (
        f"{_many(plan.num_ranks, 'rank')} with {_many(plan.num_virtual, 'stage')} each, placed as a {plan.placement}"
    )
    console.print(Text.assemble((model, "bold"), f"  {stages}"), soft_wrap=True)
    console.print(f"  {_many(plan.num_blocks, 'block')}; slowest stage {plan.balance:.2f} of the mean", soft_wrap=True)
    table = _table("  stage", "rank", "modules", "parameters", "GFLOPs", "takes", "receives", "has stored", "sends")
    for fact in plan.facts:
        table.add_row(
            f"  {fact.stage}",
            str(fact.rank),
            _span(fact.modules),
            f"{fact.num_parameters:,}",
            f"{fact.flops / 1e9:,.3f}",
            ", ".join(fact.inputs) or "-",
            str(len(fact.receives)),
            str(len(fact.reads_from_store)),
            str(len(fact.sends)),
        )
    console.print(table)
    formulas = plan.formulas()
    traffic = _table("  mode", "tensors", "formula", "per hop", "MB", "held by a rank, MB")
    for mode, of in plan.traffic.items():
        chosen = " (chosen)" if mode == plan.mode else ""
        hops = " ".join(str(units) for units in of.per_hop_units)
        held = max(of.held_bytes) / 1e6
        row = (f"  {mode}{chosen}", str(of.total_units), f"{formulas[mode]:g}", hops)
        traffic.add_row(*row, f"{of.total_bytes / 1e6:,.3f}", f"{held:,.3f}")
    console.print(traffic)
    console.print("  of one microbatch, forward; formulas count blocks alone, as if every stage made equally many")
    for name, used in plan.tied.items():
        console.print(f"  {name} is used in stages {', '.join(map(str, used))}: add up its gradients", soft_wrap=True)


def diagnosis(found: "Diagnosis") -> None:
    """Print what every read mixes, and the size and the gradient of every update."""
    console = _console()
    loss = "no finite loss" if found.loss is None else f"loss {found.loss:.4f}"
    original = "" if found.baseline_loss is None else f", of the original {found.baseline_loss:.4f}"
    size = f"{found.mode} mode, {_many(found.num_batches, 'batch', 'batches')}, {_many(found.num_tokens, 'token')}"
    console.print(Text.assemble((found.model, "bold"), f"  {size}; {loss}{original}"), soft_wrap=True)
    for stream in found.streams:
        console.print()
        console.print(Text.assemble((stream.name, "bold"), f"  width {stream.width}"), soft_wrap=True)
        console.print(_weights_table(stream.reads))
        console.print(_updates_table(stream))


def _weights_table(reads: "Sequence[ReadDiagnosis]") -> Table:
    columns = ("  state", "read by", "before", "sources", "most weight", "on", "entropy", "effective sources")
    table = _table(*columns)
    for read in reads:
        top = max(range(len(read.weights)), key=read.weights.__getitem__)
        row = (f"  {read.state}", read.owner or "(the model)", read.before or "-", str(len(read.sources)))
        weight = f"{read.weights[top]:.3f} ± {read.spreads[top]:.3f}"
        source = read.sources[top] if read.weights[top] - min(read.weights) > ALIKE else "(all alike)"
        table.add_row(*row, weight, source, f"{read.entropy:.3f}", f"{read.effective_sources:.2f}")
    return table


def _updates_table(stream: "StreamDiagnosis") -> Table:
    own = ("  update", "by", "block", "rms", "rms of the sum", "gradient norm")
    before = ("rms before", "sum before", "gradient before") if stream.baseline_root_rms is not None else ()
    table = _table(*own, *before)
    for update in stream.updates:
        row = (f"  {update.index}", update.owner or "(the model)", str(update.block))
        figures = (update.output_rms, update.sum_rms, update.gradient_norm, *_before(update))
        table.add_row(*row, *(f"{figure:.4g}" for figure in figures))
    return table


def _before(update: "UpdateDiagnosis") -> list[float]:
    """Return the figures of the original network, where it was run."""
    figures = (update.baseline_output_rms, update.baseline_sum_rms, update.baseline_gradient_norm)
    return [figure for figure in figures if figure is not None]


def _span(names: Sequence[str]) -> str:
    """Name the modules of a stage, layers in a row by the first and the last."""
    if len(names) <= 3:
        return ", ".join(names)
    numbered = [name for name in names if name.rpartition(".")[2].isdigit()]
    first, last = (numbered[0], numbered[-1]) if numbered else (names[0], names[-1])
    rest = [name for name in names if name not in numbered]
    return ", ".join([f"{first} to {last}", *rest])


def _many(count: int, noun: str, plural: str = "") -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or noun + 's'}"


def _table(*columns: str, header: bool = True) -> Table:
    table = Table(box=None, pad_edge=False, show_header=header, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
