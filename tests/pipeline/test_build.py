"""Real processes over gloo on 127.0.0.1: every schedule, losses and all gradients against one process."""

import functools
import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

import attnres_rewrite as ar
from tests.networks import VOCAB, Gpt

ids = torch.arange(12).reshape(2, 6) % VOCAB
# DualPipeV wants as many as there are stages
MICROBATCHES = 8


def loss_of(out, target):
    return F.cross_entropy(out.flatten(0, 1), target.flatten())


def model() -> ar.RewrittenModule:
    torch.manual_seed(0)
    new = ar.rewrite(
        Gpt(depth=4).double(), (ids,), config=ar.AttnResConfig(num_blocks=4), verify=False, dynamic_shapes={}
    )
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            parameter.add_(torch.randn_like(parameter))
    return new


def compare(rank: int, num_ranks: int, case: tuple[str, int, str]) -> float:
    """Run one step of a pipeline, and of the model in this process; return the largest difference."""
    schedule, virtual, mode = case
    # whole backwards only: torch refuses compiled stages where it splits them
    wrap = functools.partial(torch.compile, backend="aot_eager") if mode == "paper" and schedule == "1F1B" else None
    placement = ar.placement_for(schedule, virtual)
    plan = ar.partition(model(), num_ranks, virtual, placement=placement, mode=mode)
    sent: dict[int, int] = {}
    pipeline = ar.build_pipeline(plan, schedule, n_microbatches=MICROBATCHES, device="cpu", loss_fn=loss_of, wrap=wrap)
    for stage in pipeline.stages:
        count_sent(stage, sent)
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, VOCAB, (2, 2 * MICROBATCHES, ids.shape[1]), generator=generator)
    has_first = any(stage.is_first for stage in pipeline.stages)
    has_last = any(stage.is_last for stage in pipeline.stages)
    losses: list[torch.Tensor] | None = [] if has_last else None
    for parameter in pipeline.parameters():
        parameter.grad = None
    pipeline.schedule.step(*((tokens,) if has_first else ()), target=targets if has_last else None, losses=losses)
    pipeline.reduce_tied_gradients()
    assert pipeline.store.is_empty
    bytes_of = (*plan.traffic[mode].per_hop_bytes, 0)
    for number, moved in sent.items():
        assert moved == bytes_of[number] * MICROBATCHES, (number, moved, bytes_of)
    return difference(pipeline, tokens, targets, losses)


def count_sent(stage, sent: dict[int, int]) -> None:
    own = stage.get_fwd_send_ops

    def counting(microbatch):
        found = own(microbatch)
        moved = sum(op.tensor.numel() * op.tensor.element_size() for op in found)
        sent[stage.stage_index] = sent.get(stage.stage_index, 0) + moved
        return found

    stage.get_fwd_send_ops = counting


def difference(pipeline: ar.Pipeline, tokens, targets, losses) -> float:
    reference, worst = model(), 0.0
    for number, (x, y) in enumerate(zip(tokens.chunk(MICROBATCHES), targets.chunk(MICROBATCHES), strict=True)):
        loss = loss_of(reference(x), y)
        (loss / MICROBATCHES).backward()
        if losses is not None:
            worst = max(worst, (losses[number] - loss).abs().item())
    for stage in pipeline.stages:
        for name, parameter in stage.submod.named_parameters():
            wanted = reference.get_parameter(name.partition("graph.")[2]).grad
            assert parameter.grad is not None, name
            worst = max(worst, (parameter.grad - wanted).abs().max().item())
    return worst


def work(rank: int, num_ranks: int, port: int, cases: list[tuple[str, int, str]], results: mp.SimpleQueue) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    try:
        for case in cases:
            results.put((case, compare(rank, num_ranks, case)))
    except BaseException:
        results.put((None, traceback.format_exc()))
        # the others wait for this one
        os._exit(1)
    dist.destroy_process_group()


def run(num_ranks: int, cases: list[tuple[str, int, str]]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=work, args=(rank, num_ranks, port, cases, results)) for rank in range(num_ranks)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(num_ranks * len(cases)):
            case, worst = results.get()
            assert case is not None, worst
            assert worst < 1e-12, case
        for worker in workers:
            worker.join(30)
            assert worker.exitcode == 0
    finally:
        for worker in workers:
            worker.kill()


@pytest.mark.timeout(300)
def test_two_processes():
    cases = [
        ("1F1B", 1, "exact"),
        ("Interleaved1F1B", 2, "exact"),
        ("Interleaved1F1B", 2, "naive"),
        ("1F1B", 1, "paper"),
    ]
    run(2, [*cases, ("InterleavedZeroBubble", 2, "exact"), ("ZBVZeroBubble", 2, "exact")])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_schedule_and_mode(num_ranks):
    virtual = {"GPipe": 1, "1F1B": 1}
    schedules = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    run(num_ranks, [(name, virtual.get(name, 2), mode) for name in schedules for mode in ("naive", "paper", "exact")])
