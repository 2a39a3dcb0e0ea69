"""Export one module in one mode: the ways to call torch.export, what stays dynamic, and why none worked.

Four routes, tried in a fixed order. Non-strict captures more and takes half the time; fixed shapes are the last
resort of each. Batch and sequence are marked Dim.AUTO: torch.export fixes those that the model needs fixed.
"""

import inspect
import io
import logging
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from attnres_rewrite.errors import CaptureError, GraphBreakError, explain


@dataclass(frozen=True, slots=True)
class Route:
    """One way to call torch.export."""

    strict: bool
    dynamic: bool

    def __str__(self) -> str:
        return f"torch.export(strict={self.strict}, {'dynamic' if self.dynamic else 'fixed'} shapes)"


ROUTES = (Route(False, True), Route(False, False), Route(True, True), Route(True, False))


def asks_for_fixed(dynamic_shapes: Any) -> bool:
    return dynamic_shapes is not None and not dynamic_shapes


def routes_for(dynamic_shapes: Any) -> tuple[Route, ...]:
    """Return the routes to try: those that honour what was asked for."""
    if dynamic_shapes is None:
        return ROUTES
    return tuple(route for route in ROUTES if route.dynamic is not asks_for_fixed(dynamic_shapes))


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    routes: Sequence[Route],
) -> tuple[ExportedProgram, Route]:
    """Export `model` by the first route that works.

    Raises:
        GraphBreakError: No route worked, and control flow depends on tensor values.
        CaptureError: No route worked; the message holds each route's reason.
    """
    failures: list[tuple[Route, Exception]] = []
    automatic = dynamic_shapes is None
    for route in routes:
        try:
            shapes = dynamic_shapes if route.dynamic else None
            example: tuple[tuple[Any, ...], dict[str, Any]] = (args, kwargs)
            if automatic and route.dynamic:
                example, shapes = _with_batch_of_two(example), _automatic_shapes(model, args, kwargs)
            with quiet(), torch.enable_grad():
                return torch.export.export(model, *example, dynamic_shapes=shapes, strict=route.strict), route
        # torch.export raises whatever the model or the tracer raises: every class is a reason here.
        except Exception as why:
            failures.append((route, why))
    raise _capture_error(model, failures)


def _capture_error(model: nn.Module, failures: list[tuple[Route, Exception]]) -> CaptureError:
    seen = "\n  ".join(f"{route}: {_first_lines(why)}" for route, why in failures)
    name = type(model).__name__
    place = next((found for _, why in failures if (found := _user_frame(why))), None)
    if any(_is_graph_break(why) for _, why in failures):
        error = GraphBreakError(
            explain(
                f"control flow of {name} depends on tensor values",
                place,
                seen,
                "Write the choice as tensor operations (torch.where, torch.cond), or set the option that avoids it.",
            )
        )
    else:
        error = CaptureError(
            explain(
                f"{name} could not be captured on these example inputs",
                place,
                seen,
                _USE_NO_CACHE if "Cache" in seen else _RUN_IT_FIRST,
            )
        )
    error.__cause__ = failures[0][1] if failures else None
    return error


_RUN_IT_FIRST = "First check that model(*args, **kwargs) runs, on the device of its parameters."
_USE_NO_CACHE = "The model returns its key-value cache, which has no pytree: call it with use_cache=False."


def _is_graph_break(why: Exception) -> bool:
    name = type(why).__name__
    return "DataDependent" in name or "data-dependent" in str(why).lower()


def _first_lines(why: Exception) -> str:
    lines = [line.strip() for line in str(why).splitlines() if line.strip()]
    return f"{type(why).__name__}: {' '.join(lines[:2])[:300]}"


def _user_frame(why: BaseException) -> str | None:
    """Return file:line of the deepest frame that is not torch's, where the model's code stopped."""
    place, trace = None, why.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and "/attnres_rewrite/" not in file and not file.startswith("<"):
            place = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _automatic_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Mark batch and sequence as Dim.AUTO, in the nesting of the forward's own parameters."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(automatic_dims, value) for name, value in bound.items()}


def _with_batch_of_two(inputs: Any) -> Any:
    """Double a batch of one: torch.export takes a size of one for a constant, and would fix it."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if any(leaf.shape[0] != 1 for leaf in tensors):
        return inputs
    return pytree.tree_map_only(torch.Tensor, lambda leaf: torch.cat([leaf, leaf]) if leaf.dim() else leaf, inputs)


def automatic_dims(leaf: object) -> dict[int, Any] | None:
    if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
        return None
    return {dim: Dim.AUTO for dim in range(2 if leaf.dim() in (2, 3) else 1)}


@contextmanager
def quiet() -> Generator[None]:
    """Silence what torch.export prints, logs and warns of: its failures come as exceptions too."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
