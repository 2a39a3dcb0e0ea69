"""Real processes over gloo on 127.0.0.1: every schedule, losses and all gradients against one process."""

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import attnres_rewrite as ar
from attnres_rewrite.keyed_random import make_key
from attnres_rewrite.passes.key_draws import KEY
from attnres_rewrite.pipeline.schedules import runs_here
from attnres_rewrite.pipeline.stage import by_position
from tests.networks import VOCAB
from tests.pipeline.networks import BATCH, BUILDERS, LENGTH, inputs_of, rewritten
from tests.processes import run_on_ranks

# DualPipeV wants as many as there are stages
MICROBATCHES = 8
SEED = 7


@dataclass(frozen=True)
class Case:
    schedule: str
    virtual: int
    mode: str
    network: str = "gpt"
    compiled: bool = False


rewritten_once = functools.cache(rewritten)


def copy_of(network: str) -> ar.RewrittenModule:
    """Return a new copy of the network: to rewrite it for every case would take most of the time."""
    return copy.deepcopy(rewritten_once(network))


def loss_of(out, target):
    # T5 returns its encoder's states as well
    logits = out[0] if isinstance(out, tuple) else out
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def compare(num_ranks: int, case: Case) -> float:
    """Run one step of a pipeline, and of the model in this process; return the largest difference."""
    # whole backwards only: torch refuses compiled stages where it splits them
    wrap = functools.partial(torch.compile, backend="aot_eager") if case.compiled else None
    placement = ar.placement_for(case.schedule, case.virtual)
    plan = ar.partition(copy_of(case.network), num_ranks, case.virtual, placement=placement, mode=case.mode)
    sent: dict[int, int] = {}
    pipeline = ar.build_pipeline(
        plan, case.schedule, n_microbatches=MICROBATCHES, device="cpu", loss_fn=loss_of, wrap=wrap
    )
    pipeline.seed_draws(SEED)
    for stage in pipeline.stages:
        count_sent(stage, sent)
    torch.manual_seed(1)
    inputs = inputs_of(case.network, BATCH * MICROBATCHES)
    targets = torch.randint(0, VOCAB, (BATCH * MICROBATCHES, LENGTH))
    by_name = {name for stage in pipeline.stages if not stage.is_first for name in by_position(stage.inputs)}
    first = by_position(plan.stages[0].inputs) if dist.get_rank() == 0 else ()
    losses: list[Tensor] = []
    for parameter in pipeline.parameters():
        parameter.grad = None
    pipeline.step(
        *(inputs[name] for name in first),
        target=targets,
        losses=losses,
        **{name: value for name, value in inputs.items() if name in by_name},
    )
    pipeline.reduce_tied_gradients()
    assert pipeline.store.is_empty
    bytes_of = (*plan.traffic[case.mode].per_hop_bytes, 0)
    for number, moved in sent.items():
        assert moved == bytes_of[number] * MICROBATCHES, (number, moved, bytes_of)
    return difference(case.network, pipeline, inputs, targets, losses)


def one_process(name: str) -> tuple[torch.nn.Module, list[dict[str, Tensor]]]:
    """Return the network, and what it is given beside its inputs for each microbatch."""
    new = copy_of(name)
    whole = ar.partition(new, 1).stages[0]
    if KEY not in whole.inputs:
        return new, [{} for _ in range(MICROBATCHES)]
    return whole.module, [{KEY: make_key(SEED, 0, microbatch)} for microbatch in range(MICROBATCHES)]


def count_sent(stage, sent: dict[int, int]) -> None:
    own = stage.get_fwd_send_ops

    def counting(microbatch):
        found = own(microbatch)
        moved = sum(op.tensor.numel() * op.tensor.element_size() for op in found)
        sent[stage.stage_index] = sent.get(stage.stage_index, 0) + moved
        return found

    stage.get_fwd_send_ops = counting


def difference(name: str, pipeline: ar.Pipeline, inputs, targets, losses) -> float:
    (reference, keys), worst = one_process(name), 0.0
    for microbatch, key in enumerate(keys):
        x = {each: value.chunk(MICROBATCHES)[microbatch] for each, value in inputs.items()}
        loss = loss_of(logits_of(reference(**x, **key)), targets.chunk(MICROBATCHES)[microbatch])
        (loss / MICROBATCHES).backward()
        if losses:
            worst = max(worst, (losses[microbatch] - loss).abs().item())
    for stage in pipeline.stages:
        for name, parameter in stage.submod.named_parameters():
            wanted = reference.get_parameter(name.partition("graph.")[2]).grad
            assert (parameter.grad is None) == (wanted is None), name
            if wanted is not None:
                worst = max(worst, (parameter.grad - wanted).abs().max().item())
    # of all ranks; so large a norm is clipped nowhere
    wanted = torch.nn.utils.get_total_norm(p.grad for p in reference.parameters() if p.grad is not None)
    return max(worst, (pipeline.clip_grad_norm_(1e9) - wanted).abs().item())


def logits_of(out):
    return out.logits if hasattr(out, "logits") else out


def compare_all(num_ranks: int, cases: list[Case]) -> None:
    for case in filter(lambda case: runs_here(case.schedule), cases):
        worst = compare(num_ranks, case)
        assert worst < 1e-12, (case, worst)


@pytest.mark.timeout(300)
def test_two_processes():
    run_on_ranks(
        2,
        compare_all,
        2,
        [
            Case("1F1B", 1, "exact"),
            Case("Interleaved1F1B", 2, "naive"),
            Case("1F1B", 1, "paper", compiled=True),
            Case("InterleavedZeroBubble", 2, "exact", "gpt_frozen"),
            Case("ZBVZeroBubble", 2, "exact", "llama"),
            Case("Interleaved1F1B", 2, "exact", "gpt2"),
        ],
    )


SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("network", BUILDERS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_schedule_and_mode(num_ranks, network):
    virtual = {"GPipe": 1, "1F1B": 1}
    modes = ("naive", "paper", "exact")
    cases = [Case(name, virtual.get(name, 2), mode, network) for name in SCHEDULES for mode in modes]
    run_on_ranks(num_ranks, compare_all, num_ranks, cases)
