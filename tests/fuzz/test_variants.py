"""Generated networks, rewritten with random variants of the read: both proofs, reports and gradients.

2 networks by default, 300 with `-m slow`.
"""

import pytest
import torch

from .check import failure, variant_config
from .specs import random_spec


@pytest.fixture(autouse=True)
def _no_stack_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.fx.config, "do_not_emit_stack_traces", True, raising=False)


def check(seed: int) -> None:
    seen = failure(random_spec(seed), variant_config)
    assert seen is None, f"{random_spec(seed)!r}\n{seen.step}: {seen.error}: {seen.details}"


@pytest.mark.parametrize("seed", range(2))
def test_networks(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 300))
def test_many_networks(seed: int) -> None:
    check(seed)
