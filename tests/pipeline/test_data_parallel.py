"""Two pipelines of two ranks each, side by side, their stages wrapped for data parallelism, against one process."""

import functools

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import attnres_rewrite as ar
from attnres_rewrite.pipeline.schedules import runs_here
from tests.networks import VOCAB
from tests.pipeline.networks import BATCH, LENGTH, inputs_of, rewritten
from tests.pipeline.test_build import loss_of
from tests.processes import run_on_ranks

MICROBATCHES = 4
PIPELINES = 2


def compare(wrapper: str, schedule: str) -> float:
    mesh = init_device_mesh("cpu", (2, PIPELINES), mesh_dim_names=("pp", "dp"))
    wraps = {
        "ddp": functools.partial(DistributedDataParallel, process_group=mesh["dp"].get_group()),
        "fully_shard": functools.partial(fully_shard, mesh=mesh["dp"]),
    }
    pipeline = ar.build_pipeline(
        ar.partition(rewritten("gpt"), 2, 2, placement=ar.placement_for(schedule, 2)),
        schedule,
        n_microbatches=MICROBATCHES,
        device="cpu",
        loss_fn=loss_of,
        group=mesh["pp"].get_group(),
        wrap=wraps[wrapper],
    )
    torch.manual_seed(1)
    count = BATCH * MICROBATCHES * PIPELINES
    ids, targets = inputs_of("gpt", count)["ids"], torch.randint(0, VOCAB, (count, LENGTH))
    own = mesh["dp"].get_local_rank()
    is_first = mesh["pp"].get_local_rank() == 0
    # once refused by fully_shard: a whole state dict
    with torch.no_grad():
        for parameter in pipeline.parameters():
            parameter.zero_()
    pipeline.load_state_dict(rewritten("gpt").state_dict())
    # gradients of a step that was zeroed must leave nothing behind, and those of two steps add up
    for num_steps in (1, 2):
        for parameter in pipeline.parameters():
            parameter.grad = None
        pipeline.evaluate(*((ids.chunk(PIPELINES)[own],) if is_first else ()), target=targets.chunk(PIPELINES)[own])
        for _ in range(num_steps):
            pipeline.step(*((ids.chunk(PIPELINES)[own],) if is_first else ()), target=targets.chunk(PIPELINES)[own])
        pipeline.reduce_tied_gradients()
    return difference(pipeline, ids, targets)


def difference(pipeline: ar.Pipeline, ids, targets) -> float:
    reference, worst, count = rewritten("gpt"), 0.0, MICROBATCHES * PIPELINES
    for x, y in zip(ids.chunk(count), targets.chunk(count), strict=True):
        (loss_of(reference(x), y) / count).backward()
    for stage in pipeline.stages:
        for name, parameter in stage.submod.named_parameters():
            found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            wanted = reference.get_parameter(name.partition("graph.")[2]).grad
            worst = max(worst, (found - 2 * wanted).abs().max().item())
    norm = 2 * torch.nn.utils.get_total_norm(parameter.grad for parameter in reference.parameters())
    worst = max(worst, (pipeline.clip_grad_norm_(0.1) - norm).abs().item())
    return max(worst, (pipeline.clip_grad_norm_(1e9) - 0.1).abs().item() - 1e-6)


def compare_all(cases: list[tuple[str, str]]) -> None:
    for case in filter(lambda case: runs_here(case[1]), cases):
        worst = compare(*case)
        assert worst < 1e-12, (case, worst)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stages_in_data_parallel():
    cases = [("ddp", "Interleaved1F1B"), ("fully_shard", "Interleaved1F1B"), ("fully_shard", "ZBVZeroBubble")]
    run_on_ranks(2 * PIPELINES, compare_all, cases)
