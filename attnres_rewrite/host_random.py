"""Draws from generators that no graph records: Python's `random` and numpy's global one.

if random.random() < p: continue      captured, this is one draw for ever: the layer is in, or it is out
"""

import random
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from attnres_rewrite.errors import CaptureError, explain


@contextmanager
def host_draws_refused(name: str) -> Generator[None]:
    """Raise CaptureError when the body, which captures the model called `name`, moves such a generator on.

    Either way the generators are put back.
    """
    before = _states()
    try:
        yield
        moved = [
            generator for generator, state in _states().items() if generator in before if state != before[generator]
        ]
    finally:
        _restore(before)
    if moved:
        raise CaptureError(
            explain(
                f"the forward of {name} draws from {' and '.join(moved)}",
                None,
                "A graph keeps the one draw of its capture: what is skipped at random would be in it always, or never.",
                "Draw with torch (torch.rand) and multiply the branch by it, or take the draw out of the forward.",
            )
        )


def _states() -> Mapping[str, Any]:
    found: dict[str, Any] = {"random": random.getstate()}
    if numpy := sys.modules.get("numpy"):
        # an array among them has no truth value
        found["numpy.random"] = [getattr(part, "tolist", lambda part=part: part)() for part in numpy.random.get_state()]
    return found


def _restore(states: Mapping[str, Any]) -> None:
    random.setstate(states["random"])
    if "numpy.random" in states:
        sys.modules["numpy"].random.set_state(tuple(states["numpy.random"]))
