"""One rank of two fails or dies: both end, with its error."""

import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import attnres_rewrite as ar
from attnres_rewrite.errors import PipelineFailedError
from tests.pipeline.networks import rewritten
from tests.processes import start_ranks

ids = torch.zeros(4, 6, dtype=torch.long)


def break_down(pipeline: ar.Pipeline, how: str, rank: int) -> None:
    def fail(*args, **kwargs):
        if how == "dies":
            os._exit(3)
        raise FloatingPointError("the weights are no numbers")

    if rank == 1 and how in ("raises", "dies"):
        pipeline.stages[0].submod.forward = fail


def work(how: str, results: mp.SimpleQueue) -> None:
    rank = dist.get_rank()
    pipeline = ar.build_pipeline(
        ar.partition(rewritten("gpt"), 2),
        "1F1B",
        n_microbatches=2,
        device="cpu",
        loss_fn=lambda out, target: out.sum(),
    )
    break_down(pipeline, how, rank)
    given = ids[:3] if how == "size" else ids
    start = time.monotonic()
    try:
        pipeline.step(*((given,) if rank == 0 else ()), target=ids)
    except Exception as error:
        cause = error.__cause__
        results.put((rank, type(error), str(error), str(cause), time.monotonic() - start))


def run(how: str) -> dict[int, tuple[type, str, str, float]]:
    results = mp.get_context("spawn").SimpleQueue()
    workers = start_ranks(2, work, how, results)
    try:
        for worker in workers:
            worker.join(120)
            assert worker.exitcode is not None, "a rank hangs"
    finally:
        for worker in workers:
            worker.kill()
    found = {}
    while not results.empty():
        rank, *rest = results.get()
        found[rank] = tuple(rest)
    return found


def assert_in_time(found) -> None:
    assert all(seconds < 60 for *_, seconds in found.values())


@pytest.mark.timeout(300)
def test_an_error_of_one_rank_is_that_of_every_rank():
    found = run("raises")
    assert_in_time(found)
    assert found[1][0] is RuntimeError
    assert "the weights are no numbers" in found[1][2]
    assert found[0][0] is PipelineFailedError
    assert "rank 1: FloatingPointError: the weights are no numbers" in found[0][1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_died_is_told_from_one_that_failed():
    found = run("dies")
    assert_in_time(found)
    assert list(found) == [0]
    assert found[0][0] is PipelineFailedError
    assert "the connection to another process broke" in found[0][1]


@pytest.mark.timeout(300)
def test_a_batch_that_is_no_multiple_of_the_microbatches():
    found = run("size")
    assert_in_time(found)
    assert found[0][0] is ValueError
    assert "ids is (3, 6): 2 microbatches of (2, 6), the example inputs of the plan, are (4, 6)" in found[0][1]
    assert found[1][0] is PipelineFailedError
    assert "ids is (3, 6)" in found[1][1]
