"""One page about one rewrite: a report or a rewritten model -> HTML that needs nothing but itself.

The page fetches nothing, and its Content-Security-Policy forbids that it could: its style and its script are named by
their hashes, pictures are data. Without its script it is the same page, with tables that stay in their order.
"""

import base64
import hashlib
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import torch
from markupsafe import Markup

from attnres_rewrite.diagnosis import Diagnosis
from attnres_rewrite.module import RewrittenModule
from attnres_rewrite.page.choose_layer import choose_layer
from attnres_rewrite.page.forecast import chosen_bytes, forecast
from attnres_rewrite.page.learnt import check_same_network, learnt_terms
from attnres_rewrite.page.sketch_after import sketch_after
from attnres_rewrite.page.sketch_before import sketch_before
from attnres_rewrite.page.svg import draw
from attnres_rewrite.plot_style import follows_scheme
from attnres_rewrite.plots import svg_figures
from attnres_rewrite.report import RewriteReport
from attnres_rewrite.source_lines import place
from attnres_rewrite.version import __version__

TOKEN_COUNTS = (1, 4096, 131072)
# with three digits; Python would write 1e+03
ROUNDS_TO_1000 = 999.5


def html_report(
    report_or_model: RewriteReport | RewrittenModule,
    *,
    figures: Mapping[str, str] | None = None,
    diagnosis: Diagnosis | None = None,
) -> str:
    """Return one self-contained HTML page about a rewrite: what was found, proved, scheduled, and what it costs.

    Args:
        report_or_model: What `rewrite` or `load` returned, or a report alone. Only a model has the graphs that
            the picture of a layer and the time of a step are taken from.
        figures: SVG texts by title, shown as "What the network learnt". They are embedded as pictures, so that
            nothing in them runs or styles the page. One without colours of its own for a dark page stands on white.
        diagnosis: Of the same network: its plots, in colours that follow the page, and what was run for them.

    Returns:
        The text of the page, UTF-8. Everything that comes from the model is escaped.

    Raises:
        TypeError: Neither a report nor a rewritten model, or no diagnosis.
        ValueError: A figure is no SVG, or the diagnosis has no figures because no batch was finite.
        ArtifactError: The diagnosis is of another network.
        MissingPackageError: There is a diagnosis, and matplotlib is not installed.
    """
    model = report_or_model if isinstance(report_or_model, RewrittenModule) else None
    report = model.report if model is not None else report_or_model
    # callers are not all type-checked
    if not isinstance(report, RewriteReport):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"html_report() takes a RewriteReport or what rewrite() returned, not {type(report).__name__}")
    if diagnosis is not None and not isinstance(diagnosis, Diagnosis):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"diagnosis is what diagnose() or Diagnosis.load() returned, not {type(diagnosis).__name__}")
    style, script = _shipped("report.css"), _shipped("report.js")
    reasons = Counter(add.reason for add in report.left_alone)
    shown = dict(figures or {})
    if diagnosis is not None:
        shown = svg_figures(diagnosis) | shown
        check_same_network(diagnosis, report)
    return (
        _environment()
        .from_string(_shipped("report.html.jinja"))
        .render(
            report=report,
            picture=None if model is None else picture_of(model),
            forecast=forecast(report, model),
            figures=[(title, _picture_data(title, svg), follows_scheme(svg)) for title, svg in shown.items()],
            learnt=[] if diagnosis is None else learnt_terms(diagnosis),
            reasons=reasons.most_common(),
            versions={"attnres-rewrite": __version__, "torch": torch.__version__, "Python": platform.python_version()},
            token_counts=TOKEN_COUNTS,
            style=Markup(style),
            script=Markup(script),
            policy=_policy(style, script),
        )
    )


@dataclass(frozen=True, slots=True)
class Picture:
    """One layer, drawn before and after."""

    layer: str
    stream: str
    mode: str
    before: Markup
    after: Markup


def picture_of(model: RewrittenModule) -> Picture:
    """Draw one layer of the longest stream, in the mode that the model is in."""
    program = model.programs[model.training]
    plan = max(program.plans, key=lambda plan: len(plan.stream.updates))
    layer = choose_layer(plan)
    before = draw(sketch_before(program, plan, layer), "before", f"{layer.title} as it was captured")
    after = draw(sketch_after(program, plan, layer), "after", f"{layer.title} as it was rewritten")
    # draw() escapes every name
    mode = "train" if model.training else "eval"
    return Picture(layer.title, plan.stream.name, mode, Markup(before), Markup(after))


def _shipped(name: str) -> str:
    return resources.files("attnres_rewrite.page").joinpath(name).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Any] = {
        "many": many,
        "size": size_text,
        "time": time_text,
        "error": error_text,
        "chosen_bytes": chosen_bytes,
        "place": lambda source_line: place(source_line) if source_line else "unknown",
    }
    environment.filters.update(filters)
    return environment


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _picture_data(title: str, svg: str) -> str:
    # callers are not all type-checked
    if not isinstance(svg, str) or "<svg" not in svg:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"the figure {title!r} is no SVG text: it begins with {svg[:40]!r}")
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def many(count: int, noun: str) -> str:
    """Count things: 1 read, 2,000 reads."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def size_text(num_bytes: float) -> str:
    """Write a number of bytes in the unit that fits: 1.5 MB is 1,500,000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < ROUNDS_TO_1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{_digits(num_bytes)} TB"


def time_text(ns: float) -> str:
    """Write a time in the unit that fits: 1500 ns are 1.5 µs."""
    for unit in ("ns", "µs"):
        if abs(ns) < ROUNDS_TO_1000:
            return f"{ns:.3g} {unit}"
        ns /= 1000
    return f"{_digits(ns)} ms"


def _digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < ROUNDS_TO_1000 else f"{value:,.0f}"


def error_text(value: float) -> str:
    """Write a relative error: 1.5e-15; an error of none at all is 0."""
    return "0" if value == 0 else f"{value:.1e}"
