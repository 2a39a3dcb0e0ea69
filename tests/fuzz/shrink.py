"""Make a failing network small: shrink(spec, fails) -> the smallest spec that it finds still failing.

Greedy: fewer layers first, then each feature back to its simplest value, then shorter cycles of
mixers, MLPs and spellings, then smaller sizes; from the start again after every step that still fails.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from .specs import CHOICES, CYCLES, NetworkSpec, changed_fields, default_of, repair

SIZES = ("layers", "width", "heads", "head_dim", "batch", "length")


def shrink(spec: NetworkSpec, fails: Callable[[NetworkSpec], bool], max_tries: int = 1000) -> NetworkSpec:
    """Return a spec that `fails` and of which no simpler neighbour does. `spec` itself must fail.

    After `max_tries` calls of `fails` the smallest spec so far is returned instead.
    """
    tries = iter(range(max_tries))
    smaller: NetworkSpec | None = spec
    while smaller is not None:
        spec = smaller
        candidates = (simpler for simpler, _ in zip(neighbours(spec), tries, strict=False))
        smaller = next((simpler for simpler in candidates if fails(simpler)), None)
    return spec


def neighbours(spec: NetworkSpec) -> Iterator[NetworkSpec]:
    """Yield the specs one step simpler than `spec`, the biggest steps first, each once."""
    seen = {spec}
    for changed in _steps(spec):
        simpler = repair(changed)
        # a repair may undo the step, or set another field back to what it was
        if simpler not in seen and complexity(simpler) < complexity(spec):
            seen.add(simpler)
            yield simpler


def complexity(spec: NetworkSpec) -> tuple[int, int]:
    """Order specs: features in use, then the sum of all sizes."""
    changed = changed_fields(spec).keys() - set(SIZES)
    sizes = sum(getattr(spec, name) for name in SIZES)
    return len(changed), sizes + sum(len(getattr(spec, name)) for name in CYCLES)


def _steps(spec: NetworkSpec) -> Iterator[NetworkSpec]:
    yield from _smaller(spec, "layers")
    for name in (*CHOICES, *CYCLES):
        if name not in SIZES:
            yield replace(spec, **{name: default_of(name)})
    for name in CYCLES:
        for entry in dict.fromkeys(getattr(spec, name)):
            yield replace(spec, **{name: (entry,)})
        for dropped in range(len(getattr(spec, name))):
            entries = getattr(spec, name)
            yield replace(spec, **{name: entries[:dropped] + entries[dropped + 1 :]})
    for name in SIZES[1:]:
        yield from _smaller(spec, name)


def _smaller(spec: NetworkSpec, name: str) -> Iterator[NetworkSpec]:
    """Yield `spec` with its smallest size, with half, and with two less and one less: some bugs need odd."""
    size, least = getattr(spec, name), min(CHOICES[name])
    for smaller in dict.fromkeys((least, (size + least) // 2, size - 2, size - 1)):
        if least <= smaller < size and smaller in CHOICES[name]:
            yield replace(spec, **{name: smaller})
