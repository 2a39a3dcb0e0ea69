"""Processes that find each other over gloo on 127.0.0.1, for the tests of what runs on several."""

import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(num_ranks: int, body: Callable[..., None], *args) -> None:
    """Call ``body(*args)`` in that many processes. The first error of one is raised here, and ends the others."""
    mp.spawn(_enter, (num_ranks, _free_port(), body, args), nprocs=num_ranks, daemon=True)


def start_ranks(num_ranks: int, body: Callable[..., None], *args) -> list:
    """Start ``body(*args)`` in that many processes and return them: nothing ends one when another fails."""
    started = mp.spawn(_enter, (num_ranks, _free_port(), body, args), nprocs=num_ranks, join=False, daemon=True)
    return started.processes


def _enter(rank: int, num_ranks: int, port: int, body: Callable[..., None], args: tuple) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    body(*args)
    dist.destroy_process_group()
    # gloo's threads may still let go of tensors, for which they want the interpreter: one that is ending aborts then
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
