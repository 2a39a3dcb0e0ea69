"""A loaded model -> its rewrite: the one it is, the one it was attached or trained as, or one made now."""

from typing import Any

import attnres_rewrite as ar
from attnres_rewrite.cli import load, render


def rewritten(
    found: load.Loaded, config: "ar.AttnResConfig", progress: render.Stage, *, verify: bool, dynamic_shapes: Any = None
) -> "ar.RewrittenModule":
    """Return the rewrite of what `load` found; a saved one is returned as it is, without its proofs.

    Raises:
        RewriteError: A refusal, as of `rewrite`.
        ValueError: It was trained with another config than the options say.
    """
    if found.kind == "rewrite":
        return found.model
    if found.kind == "trained":
        progress("capture, for its own queries")
        ar.attach(found.model, _given(config), found.args, found.kwargs)
    if found.kind != "original":
        return ar.as_rewritten(found.model, found.args, found.kwargs, dynamic_shapes, verify=verify, progress=progress)
    return ar.rewrite(found.model, found.args, found.kwargs, config, dynamic_shapes, verify=verify, progress=progress)


def reported(found: load.Loaded, config: "ar.AttnResConfig", progress: render.Stage) -> "ar.RewriteReport":
    """Return the report of what `load` found, without rewriting it.

    Takes and raises what `rewritten` does.
    """
    if found.kind == "rewrite":
        return found.model.report
    if found.kind == "trained":
        return ar.attach(found.model, _given(config), found.args, found.kwargs)
    if found.kind == "attached":
        return rewritten(found, config, progress, verify=False, dynamic_shapes={}).report
    return ar.inspect(found.model, found.args, found.kwargs, config, progress=progress)


def _given(config: "ar.AttnResConfig") -> "ar.AttnResConfig | None":
    """Return what the options say; None where they say nothing, and the model's own config counts."""
    return None if config == ar.AttnResConfig() else config
