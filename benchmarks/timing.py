"""The clock of the benchmarks: medians of single calls, and what a copy reaches on the same machine.

A call that launches kernels returns before they have run. On a GPU the time is that of the kernels, between two events:
the GPU is kept busy while the call launches, by writing over a buffer larger than its cache, so that it does not wait
for the first launch, and finds no input in the cache. Where a call launches slower than its kernels run, that shows
all the same; `launch_seconds_of` says how long the launching took.
"""

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
    return statistics.median((_by_events if device == "cuda" else _by_clock)(operation, rounds))


def launch_seconds_of(operation: Callable[[], Any], rounds: int, device: str) -> float:
    """Return the median time until a call returns, whatever it has launched."""
    found: list[float] = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        operation()
        found.append(time.perf_counter() - start)
    synchronize(device)
    return statistics.median(found)


def _by_clock(operation: Callable[[], Any], rounds: int) -> list[float]:
    found: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        operation()
        found.append(time.perf_counter() - start)
    return found


def _by_events(operation: Callable[[], Any], rounds: int) -> list[float]:
    written = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(rounds)]
    for start, end in pairs:
        # about half a millisecond at 4 TB/s
        for _ in range(4):
            written.zero_()
        start.record()
        operation()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def copy_bandwidth(rounds: int, device: str) -> float:
    """Return the bytes a second, read and written, of a copy that is larger than any cache."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), rounds, device)
