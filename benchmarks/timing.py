"""The clock of the benchmarks: medians of single calls, and what a copy reaches on the same machine."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import synchronize

COPIED_BYTES = 1 << 29


def seconds_of(operation: Callable[[], Any], rounds: int, device: str) -> float:
    """Return the median time of a call, after three that do not count."""
    for _ in range(3):
        operation()
    found: list[float] = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        operation()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def copy_bandwidth(rounds: int, device: str) -> float:
    """Return the bytes a second, read and written, of a copy that is larger than any cache."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), rounds, device)
