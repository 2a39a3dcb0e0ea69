"""shrink keeps what makes a spec fail, and nothing else."""

from collections.abc import Callable

import pytest

from .shrink import complexity, neighbours, shrink
from .specs import NetworkSpec, changed_fields, random_spec, why_not

CASES: dict[str, tuple[Callable[[NetworkSpec], bool], dict[str, object]]] = {
    "anything": (lambda s: True, {}),
    "depth": (lambda s: s.layers >= 3, {"layers": 3}),
    "pair": (lambda s: s.layer_scale and s.drop == "drop_path", {"layer_scale": True, "drop": "drop_path"}),
    "entry": (lambda s: "nested" in s.mlps, {"mlps": ("nested",)}),
    "order": (
        lambda s: s.mixers[0] == "scan" and "delta" in s.mixers,
        {"mixers": ("scan", "delta")},
    ),
    "width": (lambda s: s.width % 2 == 1 and s.width > 20, {"width": 21}),
}


@pytest.mark.parametrize("case", CASES)
def test_keeps_only_the_cause(case: str) -> None:
    fails, expected = CASES[case]
    start = next(spec for seed in range(3000) if fails(spec := random_spec(seed)) and why_not(spec) is None)
    small = shrink(start, fails)
    assert fails(small)
    changed = changed_fields(small)
    if case != "width":
        # the smallest sizes are not the default ones
        changed = {name: value for name, value in changed.items() if name in expected}
    assert changed.items() >= expected.items()
    assert not any(fails(simpler) for simpler in neighbours(small))


def test_removes_every_feature_that_does_not_matter() -> None:
    small = shrink(random_spec(11), lambda spec: spec.layers >= 2)
    assert small == NetworkSpec(seed=11, batch=1, length=3)


@pytest.mark.parametrize("seed", range(40))
def test_neighbours_are_networks_and_simpler(seed: int) -> None:
    spec = random_spec(seed)
    for simpler in neighbours(spec):
        assert why_not(simpler) is None
        assert complexity(simpler) < complexity(spec)
        assert simpler.seed == spec.seed


def test_keeps_a_spec_that_cannot_be_simplified() -> None:
    spec = random_spec(3)
    assert shrink(spec, lambda other: other == spec) == spec


def test_stops_after_max_tries() -> None:
    tried: list[NetworkSpec] = []
    spec = random_spec(11)
    small = shrink(spec, lambda other: not tried.append(other), max_tries=3)
    assert len(tried) == 3
    assert small == tried[-1]
    assert complexity(small) < complexity(spec)
