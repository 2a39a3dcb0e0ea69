"""A Diagnosis -> figures for a paper or a report, and their files.

matplotlib is the extra "plot", imported here only and when something is drawn. Figures are 3.4 inches wide, one column
of two, with text of 7 points and more. Colour-blind readers can tell the colours apart: the map is cividis, lines are
from the palette of Okabe and Ito and have markers of their own.
"""

import importlib
import io
import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnres_rewrite.diagnosis import Diagnosis, ReadDiagnosis, StreamDiagnosis
from attnres_rewrite.errors import ArtifactError, MissingPackageError, explain, saying_what_cannot_be_written
from attnres_rewrite.plot_style import BAND, BLUE, GREEN, GREY, ON_A_PAGE, STYLE, VERMILION, follow_scheme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 3.4
FORMATS = ("png", "svg", "pdf")
MAP = "cividis"
LABELLED_ROWS = 32  # more reads than these are numbered, not named
LINEAR_COLUMNS = 16  # more sources than these have small weights, for which a linear scale has one colour
MARKED_BLOCKS = 32  # more blocks than these are not told apart by lines
MARKERS = 14  # on a line, at most


def require_matplotlib() -> None:
    """Raise MissingPackageError, which names the extra, when matplotlib is not installed."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as why:
        raise MissingPackageError(
            explain("plots need matplotlib", None, str(why), 'pip install "attnres-rewrite[plot]"')
        ) from why


def depth_attention(diagnosis: Diagnosis, stream: int = 0) -> "Figure":
    """Draw the mean weight of every source at every read (arXiv 2603.15031, figure 8).

    Rows are reads, from the first; columns are sources. The last cell of a row is the newest block, its partial sum
    while it is open. Lines part the blocks. A source that does not exist at a read has no colour, and is lined off.

    Args:
        diagnosis: Of a run with at least one finite batch.
        stream: Index of a stream.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: There is no such stream, or it has no figures.
    """
    require_matplotlib()
    import numpy as np
    from matplotlib.colors import PowerNorm

    of = _stream_of(diagnosis, stream)
    rows, columns = len(of.reads), len(of.blocks) + 1
    weights = np.full((rows, columns), np.nan)
    for row, read in enumerate(of.reads):
        weights[row, : len(read.weights)] = read.weights
    named = rows <= LABELLED_ROWS
    height = 0.95 + (rows * 0.135 if named else min(rows * 0.045, 5.5))
    with _figure(max(height, 1.9)) as figure:
        axes = figure.subplots()
        linear = columns <= LINEAR_COLUMNS
        norm = PowerNorm(1 if linear else 0.5, vmin=0, vmax=float(np.nanmax(weights)))
        image = axes.imshow(weights, cmap=MAP, norm=norm, aspect="auto", interpolation="none")
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
        bar.set_label("mean weight" if linear else "mean weight, square-root scale")
        _part_blocks(axes, of)
        # a small weight is nearly as dark as a dark page
        ends = [len(read.weights) - 0.5 for read in of.reads]
        axes.stairs(ends, np.arange(-0.5, rows), orientation="horizontal", baseline=None, **_like_the_frame())
        _label_reads(axes, of.reads, named)
        _label_sources(axes, columns)
        _set_title(axes, diagnosis, of, "depth attention")
    return figure


def _like_the_frame() -> dict[str, Any]:
    from matplotlib import rcParams

    return {"color": rcParams["axes.edgecolor"], "linewidth": rcParams["axes.linewidth"]}


def _part_blocks(axes: "Axes", of: StreamDiagnosis) -> None:
    """Draw a line below the last read of each block, up to the block's column."""
    if not _are_marked(of):
        return
    last = [max((row for row, read in enumerate(of.reads) if read.state <= stop), default=-1) for _, stop in of.blocks]
    for block, row in enumerate(last[:-1], start=1):
        if row >= 0:
            for colour, width in (("white", 1.6), ("black", 0.6)):  # seen on light and on dark cells
                axes.plot([-0.5, block + 0.5], [row + 0.5] * 2, color=colour, linewidth=width, solid_capstyle="butt")


def _are_marked(of: StreamDiagnosis) -> bool:
    """Say whether blocks are drawn: many of them, or blocks of one update, would hide what they part."""
    return len(of.blocks) <= MARKED_BLOCKS and len(of.blocks) < len(of.updates)


def _label_reads(axes: "Axes", reads: Sequence[ReadDiagnosis], named: bool) -> None:
    if named:
        labels = [f"{read.state} {_SHORT[read.before]}".strip() for read in reads]
        axes.set_yticks(range(len(reads)), labels)
    else:
        step = _step(len(reads), 12)
        # states that are multiples, where there are any: layers of one read each may have none but odd states
        rows = [row for row, read in enumerate(reads) if read.state % step == 0] or range(0, len(reads), step)
        axes.set_yticks(rows, [str(reads[row].state) for row in rows])
    axes.set_ylabel("state that is read")
    axes.tick_params(length=2)


_SHORT = {"attention": "attn", "mlp": "mlp", "": ""}


def _label_sources(axes: "Axes", columns: int) -> None:
    step = _step(columns, 12)
    ticks = [0, *range(step, columns, step)]
    axes.set_xticks(ticks, ["emb" if tick == 0 else str(tick) for tick in ticks])
    axes.set_xlabel("source: embedding, blocks")


def _step(count: int, most: int) -> int:
    """Return a step of ticks that leaves at most so many."""
    return next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 200, 500, 10**9) if count / step <= most)


def magnitudes(diagnosis: Diagnosis, stream: int = 0) -> "Figure":
    """Draw, over depth, the magnitude of the sum that each update goes into, and of the update (figure 5, middle).

    The sum is the partial sum of a block, of the original network the whole residual stream. Bands are blocks. Takes
    and raises what `depth_attention` does.
    """
    of = _stream_of(diagnosis, stream)
    with _figure(3.1) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        updates = of.updates
        _lines(upper, of, [update.sum_rms for update in updates], [update.baseline_sum_rms for update in updates])
        _lines(lower, of, [update.output_rms for update in updates], [update.baseline_output_rms for update in updates])
        upper.set_ylabel("rms of the sum")
        lower.set_ylabel("rms of the update")
        lower.set_xlabel("update")
        _set_title(upper, diagnosis, of, "magnitudes")
        upper.legend(frameon=False)
    return figure


def gradient_norms(diagnosis: Diagnosis, stream: int = 0) -> "Figure":
    """Draw, over depth, the norm of the loss's gradient by each update (figure 5, right).

    Takes and raises what `depth_attention` does.
    """
    of = _stream_of(diagnosis, stream)
    with _figure(2.1) as figure:
        axes = figure.subplots()
        updates = of.updates
        _lines(
            axes,
            of,
            [update.gradient_norm for update in updates],
            [update.baseline_gradient_norm for update in updates],
        )
        axes.set_ylabel("gradient norm")
        axes.set_xlabel("update")
        _set_title(axes, diagnosis, of, "gradients of the updates")
        axes.legend(frameon=False)
    return figure


def entropies(diagnosis: Diagnosis, stream: int = 0) -> "Figure":
    """Draw, over depth, the mean entropy of every read, in nats, below that of equal weights, ln S.

    Takes and raises what `depth_attention` does.
    """
    of = _stream_of(diagnosis, stream)
    with _figure(2.5) as figure:
        axes = figure.subplots()
        _shade_blocks(axes, of)
        states = [read.state for read in of.reads]
        most = [math.log(len(read.sources)) for read in of.reads]
        axes.plot(states, most, "--", color=GREY, linewidth=1, drawstyle="steps-mid", label="equal weights, ln S")
        size = STYLE["lines.markersize"] * (1 if len(states) <= LABELLED_ROWS else 0.7)
        for kind, colour, marker in (("attention", BLUE, "o"), ("mlp", VERMILION, "s"), ("", GREEN, "^")):
            chosen = [read for read in of.reads if read.before == kind]
            if chosen:
                label = f"before {kind}" if kind else "other reads"
                at, height = [read.state for read in chosen], [read.entropy for read in chosen]
                axes.plot(at, height, color=colour, marker=marker, markersize=size, linestyle="none", label=label)
        axes.set_ylim(0, 1.08 * max(most))
        _number_depth(axes, len(of.updates))
        axes.set_ylabel("entropy (nats)")
        axes.set_xlabel("state that is read")
        _set_title(axes, diagnosis, of, "entropy of the reads")
        figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return figure


PLOTS: dict[str, Callable[[Diagnosis, int], Any]] = {
    "depth_attention": depth_attention,
    "magnitudes": magnitudes,
    "gradient_norms": gradient_norms,
    "entropies": entropies,
}


def _lines(axes: "Axes", of: StreamDiagnosis, new: Sequence[float], original: Sequence[float | None]) -> None:
    """Draw a quantity of every update, and beside it that of the original where there is one."""
    _shade_blocks(axes, of)
    indices = [update.index for update in of.updates]
    every = max(1, math.ceil(len(indices) / MARKERS))
    before = [value for value in original if value is not None]
    if before:
        axes.plot(indices, before, color=VERMILION, marker="s", linestyle="--", markevery=every, label="original")
    axes.plot(indices, new, color=BLUE, marker="o", markevery=every, label="rewritten")
    values = [value for value in (*new, *before) if value > 0]
    if values and max(values) > 50 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.08 * max(values, default=1.0))
    _number_depth(axes, len(indices))


def _number_depth(axes: "Axes", last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))


def _shade_blocks(axes: "Axes", of: StreamDiagnosis) -> None:
    for first, last in of.blocks[::2] if _are_marked(of) else ():
        axes.axvspan(first - 0.5, last + 0.5, color=BAND, linewidth=0, zorder=0)


def _set_title(axes: "Axes", diagnosis: Diagnosis, of: StreamDiagnosis, what: str) -> None:
    # a dollar in a name is no formula
    axes.set_title(what if len(diagnosis.streams) == 1 else f"{of.name}: {what}", parse_math=False)


def _stream_of(diagnosis: Diagnosis, stream: int) -> StreamDiagnosis:
    require_matplotlib()
    if not diagnosis.streams:
        raise ValueError("the diagnosis has no figures to plot: no batch was finite")
    if not 0 <= stream < len(diagnosis.streams):
        raise ValueError(
            f"stream={stream}, and the diagnosis has figures of {len(diagnosis.streams)} streams, counted from 0"
        )
    return diagnosis.streams[stream]


@contextmanager
def _figure(height_in: float) -> Generator["Figure"]:
    """Make an empty figure, drawn in in our style; no state of pyplot is used."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        yield Figure(figsize=(WIDTH_IN, height_in), layout="constrained")


def save_plots(
    diagnosis: Diagnosis,
    folder: str | os.PathLike[str],
    formats: Iterable[str] = ("png", "svg"),
    force: bool = False,
) -> tuple[Path, ...]:
    """Write every plot of every stream to a folder, which is made if it is not there.

    Files are named after the plot, "depth_attention.png"; with several streams also after the stream.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ArtifactError: A file exists, and `force` is not given, when nothing is written; or one cannot be written.
        ValueError: A format is unknown, or the diagnosis has no figures.
    """
    from_formats = tuple(formats)
    if unknown := [name for name in from_formats if name not in FORMATS]:
        raise ValueError(f"formats {', '.join(unknown)} are not of {', '.join(FORMATS)}")
    _stream_of(diagnosis, 0)
    targets = _targets(diagnosis, folder, from_formats)
    if there := [str(path) for path in targets if path.exists() and not force]:
        raise ArtifactError(explain("a plot exists", there[0], "", "Give another folder, or force=True."))
    with saying_what_cannot_be_written("the folder", Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path, (plot, stream, ending) in targets.items():
            _save(PLOTS[plot](diagnosis, stream), path, ending)
    return tuple(targets)


def plot_files(
    diagnosis: Diagnosis, folder: str | os.PathLike[str], formats: Iterable[str] = ("png", "svg")
) -> tuple[Path, ...]:
    """Return the files that `save_plots` writes, whether they are there or not; none without figures."""
    return tuple(_targets(diagnosis, folder, formats))


def _targets(
    diagnosis: Diagnosis, folder: str | os.PathLike[str], formats: Iterable[str]
) -> dict[Path, tuple[str, int, str]]:
    return {
        Path(folder) / f"{prefix}{plot}.{ending}": (plot, stream, ending)
        for stream, prefix in enumerate(_prefixes(diagnosis))
        for plot in PLOTS
        for ending in formats
    }


def svg_figures(diagnosis: Diagnosis) -> dict[str, str]:
    """Draw every plot of every stream for a page: SVG texts by title, in colours that follow a light or dark scheme.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: The diagnosis has no figures.
    """
    _stream_of(diagnosis, 0)
    from matplotlib import rc_context

    figures: dict[str, str] = {}
    for stream, prefix in enumerate(_prefixes(diagnosis)):
        for plot, draw in PLOTS.items():
            words, text = plot.replace("_", " "), io.StringIO()
            with rc_context(ON_A_PAGE):
                _save(draw(diagnosis, stream), text, "svg")
            figures[f"{prefix[:-1]}: {words}" if prefix else words.capitalize()] = follow_scheme(text.getvalue())
    return figures


def _prefixes(diagnosis: Diagnosis) -> list[str]:
    if len(diagnosis.streams) == 1:
        return [""]
    names = [re.sub(r"[^\w.-]+", "_", stream.name) for stream in diagnosis.streams]
    unique = len(set(names)) == len(names)
    return [f"{name}." if unique else f"{name}.{number}." for number, name in enumerate(names, start=1)]


def _save(figure: "Figure", path: Path | io.StringIO, ending: str) -> None:
    from matplotlib import rc_context

    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with rc_context(STYLE):
        figure.savefig(path, format=ending, metadata=undated.get(ending))
