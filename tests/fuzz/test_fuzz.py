"""Generated networks: every true update is found and no other, and the rewrite proves itself.

20 networks by default, 3,000 with `-m slow`. A failure is shrunk to a small spec that fails alike; its
repr rebuilds the network: `build(NetworkSpec(...))`.
"""

import pytest
import torch

import attnres_rewrite as ar

from .check import Failure, failure
from .negatives import NegativeSpec, negative_specs
from .shrink import shrink
from .specs import NetworkSpec, random_spec

DEFAULT_SEEDS, ALL_SEEDS = 20, 3000
DEFAULT_CHUNK, SLOW_CHUNK = 5, 20
# of seconds each
MAX_TRIES = 100


@pytest.fixture(autouse=True)
def _no_stack_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    # nothing here reads them, and they take a third of the time of a capture
    monkeypatch.setattr(torch.fx.config, "do_not_emit_stack_traces", True, raising=False)


def chunks(start: int, stop: int, size: int) -> list[range]:
    """Cut a range of seeds, so that pytest-xdist can spread it."""
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


def chunk_id(seeds: range) -> str:
    return f"{seeds.start}-{seeds.stop - 1}"


@pytest.mark.parametrize("seeds", chunks(0, DEFAULT_SEEDS, DEFAULT_CHUNK), ids=chunk_id)
def test_networks(seeds: range) -> None:
    check_all(seeds)


# Once wrong. 190: the inner adds of a branch were taken for the stream. 374: a dropout mask of the proofs depended on
# the layout of memory.
@pytest.mark.parametrize("seed", [190, 374])
def test_networks_that_failed_once(seed: int) -> None:
    check_all(range(seed, seed + 1))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", chunks(DEFAULT_SEEDS, ALL_SEEDS, SLOW_CHUNK), ids=chunk_id)
def test_many_networks(seeds: range) -> None:
    check_all(seeds)


@pytest.mark.parametrize("negative", negative_specs(), ids=lambda negative: negative.name)
def test_refused(negative: NegativeSpec) -> None:
    model, args = negative.build()
    with pytest.raises(ar.NoStreamError) as refusal:
        ar.rewrite(model, args)
    assert type(refusal.value).__name__ == negative.error


def check_all(seeds: range) -> None:
    """Run every seed; shrink the first failure and list the others."""
    failures = {seed: seen for seed in seeds if (seen := failure(random_spec(seed))) is not None}
    if not failures:
        return
    first = next(iter(failures))
    listed = [f"  seed {seed}: {seen.step}, {seen.error}" for seed, seen in failures.items()]
    summary = "\n".join([f"{len(failures)} of {len(seeds)} networks failed", *listed])
    pytest.fail(f"{summary}\n{describe(random_spec(first), failures[first])}", pytrace=False)


def describe(spec: NetworkSpec, seen: Failure) -> str:
    """Return the smallest spec found that fails as `spec` did, and how."""
    small = shrink(spec, lambda simpler: seen.alike(failure(simpler)), MAX_TRIES)
    again = failure(small)
    details = "" if again is None else again.details
    return f"smallest: {small!r}\n{seen.step}: {seen.error}: {details}"
