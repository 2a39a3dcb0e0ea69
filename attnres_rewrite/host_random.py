"""Draws from generators that no graph records: Python's `random` and numpy's global one.

if random.random() < p: continue      captured, this is one draw for ever: the layer is in, or it is out

Models that skip layers at random draw in eval mode, too, and where p is 0. A draw that the capture does not depend on
is let through: it answers comparisons that hold for every number it could be, and anything else counts as a use.
"""

import operator
import random
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from attnres_rewrite.errors import CaptureError, explain


@contextmanager
def host_draws_refused(name: str) -> Generator[None]:
    """Raise CaptureError when the body, which captures the model called `name`, depends on such a generator.

    Either way the generators are put back.
    """
    before, used = _states(), dict[str, None]()
    real = {place: getattr(*place) for place in _places()}
    for (module, function), draw in real.items():
        setattr(module, function, _watched(draw, function, module.__name__, used))
    try:
        yield
        used |= {
            generator: None
            for generator, state in _states().items()
            if generator in before
            if state != before[generator]
        }
    except CaptureError as error:
        # torch takes no such number where it takes a float
        if not used and HostDraw.__name__ not in str(error):
            raise
        used = used or dict.fromkeys(module.__name__ for module, _ in real)
    finally:
        for (module, function), draw in real.items():
            setattr(module, function, draw)
        _restore(before)
    if used:
        raise CaptureError(
            explain(
                f"the forward of {name} draws from {' and '.join(used)}",
                None,
                "A graph keeps the one draw of its capture: what is skipped at random would be in it always, or never.",
                "Draw with torch (torch.rand) and multiply the branch by it, or take the draw out of the forward.",
            )
        )


class HostDraw:
    """A number between two ends, neither of which it is; `use` is called when it matters which."""

    def __init__(self, value: float, low: float, high: float, use: Callable[[], None]) -> None:
        self._value, self._low, self._high, self._use = value, low, high, use

    def __lt__(self, other: Any) -> bool:
        return self._is_below(other)

    def __le__(self, other: Any) -> bool:
        return self._is_below(other)

    def __gt__(self, other: Any) -> bool:
        return not self._is_below(other)

    def __ge__(self, other: Any) -> bool:
        return not self._is_below(other)

    def _is_below(self, other: Any) -> Any:
        if isinstance(other, int | float) and not self._low < other < self._high:
            return other >= self._high
        self._use()
        return self._value < other


def _used_as(apply: Callable[..., Any]) -> Callable[..., Any]:
    def used(self: HostDraw, *others: Any) -> Any:
        self._use()
        return apply(self._value, *others)

    return used


def _swapped(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda value, other: apply(other, value)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _apply = getattr(operator, _name)
    setattr(HostDraw, f"__{_name}__", _used_as(_apply))
    setattr(HostDraw, f"__r{_name}__", _used_as(_swapped(_apply)))
for _name, _apply in {
    "__eq__": operator.eq,
    "__ne__": operator.ne,
    "__neg__": operator.neg,
    "__abs__": abs,
    "__bool__": bool,
    "__float__": float,
    "__int__": int,
    "__round__": round,
    "__hash__": hash,
}.items():
    setattr(HostDraw, _name, _used_as(_apply))


def _places() -> list[tuple[Any, str]]:
    """Return the functions that draw one number between two ends, as module and name."""
    found = [(random, "random"), (random, "uniform")]
    if numpy := sys.modules.get("numpy"):
        found += [(numpy.random, name) for name in ("random", "random_sample", "rand", "uniform")]
    return found


def _watched(draw: Callable[..., Any], name: str, generator: str, used: dict[str, None]) -> Callable[..., Any]:
    """Return `draw`, but one number comes as a HostDraw, and the generator stays where it was."""

    def watched(*ends: Any, **options: Any) -> Any:
        allowed = (2,) if name == "uniform" else (0,)
        if options or len(ends) not in allowed or not all(isinstance(end, int | float) for end in ends):
            return draw(*ends, **options)
        low, high = sorted(ends) or (0.0, 1.0)
        return HostDraw((low + high) / 2, low, high, lambda: used.setdefault(generator))

    return watched


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
