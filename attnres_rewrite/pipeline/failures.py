"""When one rank fails, every rank ends with that rank's error, instead of waiting for it or naming a broken socket.

The first error goes into the store that the processes met in, then the failing rank closes its connections: its
neighbours' receives fail, they find the error in the store, and close theirs. A process that died left no error; its
neighbours say that they lost it.

With NCCL, closing connections does not wake a peer that waits in a kernel: there torchrun ends the other processes, or
NCCL's own timeout does.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from attnres_rewrite.errors import PipelineFailedError

_FAILURE, _SEEN = "attnres_rewrite/failure", "attnres_rewrite/failure_seen"
# how long the process that keeps the store waits for the others to read it
_LINGER_S = 20.0


@contextmanager
def ending_together() -> Generator[None]:
    """Tell all ranks of an error raised inside, and raise that of the rank that failed first.

    Raises:
        PipelineFailedError: Another rank failed first; it says which, and its error.
    """
    try:
        yield
    except Exception as error:
        if dist.get_world_size() == 1:
            raise
        own = f"rank {dist.get_rank()}: {_text_of(error)}"
        first = _publish(own)
        if first == own and not _is_lost_connection(error):
            raise
        raise PipelineFailedError(f"the pipeline ended at the error of {first}") from error


def _text_of(error: BaseException) -> str:
    """Return the error that was raised first: torch says which stage failed, and chains what did."""
    if _is_lost_connection(error):
        return f"the connection to another process broke, which died or was ended ({str(error).splitlines()[0]})"
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _is_lost_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _publish(own: str) -> str:
    """Put the error into the store unless there is one, close the connections, and return the one that is there."""
    store: Any = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=_LINGER_S))
    count, is_host = dist.get_world_size(), dist.get_rank() == 0
    try:
        first = store.compare_set(_FAILURE, "", own).decode()
        store.add(_SEEN, 1)
    except dist.DistError:
        first = own
    if dist.get_backend() != dist.Backend.NCCL:
        dist.destroy_process_group()
    if is_host:
        _linger(store, count)
    return first


def _linger(store: Any, count: int) -> None:
    deadline = time.monotonic() + _LINGER_S
    while store.add(_SEEN, 0) < count and time.monotonic() < deadline:
        time.sleep(0.05)
