"""What a user may do with a built pipeline: step after step, evaluation, bad inputs; one process runs all stages."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import attnres_rewrite as ar
from tests.networks import VOCAB, Gpt
from tests.processes import run_on_ranks

MICROBATCHES = 3
example = torch.arange(12).reshape(2, 6) % VOCAB
batch = torch.randint(0, VOCAB, (2 * MICROBATCHES, 6), generator=torch.Generator().manual_seed(0))
target = batch.roll(1, 0)


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Masked(Gpt):
    """Its last stage takes a mask; it returns the mean of its logits as well when it is told to."""

    scalar = False

    def forward(self, ids, mask):
        logits = super().forward(ids) * mask[..., None]
        return (logits, logits.mean()) if self.scalar else logits


def rewritten(model: torch.nn.Module, *inputs: torch.Tensor) -> ar.RewrittenModule:
    new = ar.rewrite(
        model.double(), inputs or (example,), config=ar.AttnResConfig(block_size=2), verify=False, dynamic_shapes={}
    )
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            parameter.add_(torch.randn_like(parameter))
    return new


def loss_of(out, wanted):
    logits = out[0] if isinstance(out, tuple) else out
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def built(new: ar.RewrittenModule, schedule: str = "LoopedBFS", virtual: int = 2, **options) -> ar.Pipeline:
    plan = ar.partition(new, dist.get_world_size(), virtual, placement=ar.placement_for(schedule, virtual))
    options = {"n_microbatches": MICROBATCHES, "loss_fn": loss_of} | options
    return ar.build_pipeline(plan, schedule, device="cpu", **options)


# Once wrong: torch divides what an earlier step left a second time
@pytest.mark.parametrize(("schedule", "virtual"), [("LoopedBFS", 2), ("GPipe", 1), ("InterleavedZeroBubble", 2)])
def test_gradients_of_several_steps_add_up(schedule, virtual):
    pipeline = built(rewritten(Gpt(depth=2)), schedule, virtual)
    pipeline.step(batch, target=target)
    once = [parameter.grad.clone() for parameter in pipeline.parameters()]
    pipeline.evaluate(batch, target=target)
    pipeline.step(batch, target=target)
    torch.testing.assert_close([parameter.grad for parameter in pipeline.parameters()], [2 * grad for grad in once])


# Once wrong: torch asked the stage behind, on the same rank, for gradients
@pytest.mark.parametrize(("schedule", "virtual"), [("LoopedBFS", 2), ("ZBVZeroBubble", 2), ("1F1B", 1)])
def test_forward_alone(schedule, virtual):
    new = rewritten(Gpt(depth=2))
    wanted = torch.cat([new(ids) for ids in batch.chunk(MICROBATCHES)])
    pipeline = built(new, schedule, virtual)
    losses = []
    out = pipeline.evaluate(batch, target=target, losses=losses)
    torch.testing.assert_close(out, wanted.detach())
    pairs = zip(wanted.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True)
    torch.testing.assert_close(losses, [loss_of(*pair).detach() for pair in pairs])
    assert pipeline.store.is_empty
    assert all(parameter.grad is None for parameter in pipeline.parameters())
    without = built(new, schedule, virtual, loss_fn=None)
    torch.testing.assert_close(without.step(batch), wanted)
    torch.testing.assert_close(without.evaluate(batch), wanted.detach())
    with pytest.raises(ValueError, match="there is no loss_fn"):
        without.evaluate(batch, losses=losses)


def test_an_evaluation_changes_no_draw_of_a_step():
    new = rewritten(Gpt(depth=2, dropout=0.5).train())
    outs = []
    for evaluations in (0, 2):
        pipeline = built(copy.deepcopy(new))
        for _ in range(evaluations):
            pipeline.evaluate(batch, target=target)
        outs.append([pipeline.step(batch, target=target) for _ in range(2)])
    torch.testing.assert_close(outs[0], outs[1])
    assert not torch.equal(*outs[0])


# Once an error at the end of the step: torch joins outputs along their batch
def test_a_scalar_output_reaches_the_loss_and_is_not_joined():
    model = Masked(depth=2)
    model.scalar = True
    pipeline = built(rewritten(model, example, example > 3))
    losses = []
    assert pipeline.step(batch, target=target, losses=losses, mask=batch > 3) is None
    assert len(losses) == MICROBATCHES


MASK = {"mask": batch > 3}
BAD = {
    "by name alone": ((), {"ids": batch} | MASK, ValueError, "takes ids by position, and 0 inputs"),
    "another size": ((batch[:4],), MASK, ValueError, r"ids is \(4, 6\): 3 microbatches of \(2, 6\)"),
    "no tensor": ((batch.tolist(),), MASK, TypeError, "ids is a list"),
    # once a KeyError from within the stage
    "missing": ((batch,), {}, ValueError, "stage 1 takes mask: give it by name"),
    # once broadcast, where it could be
    "another size by name": ((batch,), {"mask": batch[::2] > 3}, ValueError, r"mask is \(3, 6\)"),
    # once ignored
    "unknown": ((batch,), MASK | {"attention_mask": batch}, ValueError, "no stage takes attention_mask; .* ids, mask"),
    "no target": ((batch,), MASK | {"target": None}, ValueError, "needs a target"),
    "a part of the target": ((batch,), MASK | {"target": target[:5]}, ValueError, r"\(5, 6\): not 3 equal micro"),
}


@pytest.fixture(scope="module")
def masked():
    return built(rewritten(Masked(depth=2), example, example > 3))


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(masked, case):
    args, kwargs, error, says = BAD[case]
    with pytest.raises(error, match=says):
        masked.step(*args, **({"target": target} | kwargs))


def evaluate_and_step(schedules: list[tuple[str, int]]) -> None:
    torch.manual_seed(0)
    new = rewritten(Gpt(depth=4))
    for schedule, virtual in schedules:
        pipeline = built(copy.deepcopy(new), schedule, virtual, n_microbatches=4)
        ids = batch.repeat(2, 1)[:8]
        inputs = (ids,) if dist.get_rank() == 0 else ()
        for _ in range(2):
            out = pipeline.evaluate(*inputs, target=ids)
            pipeline.step(*inputs, target=ids)
        if any(stage.is_last for stage in pipeline.stages):
            torch.testing.assert_close(out, torch.cat([new(x) for x in ids.chunk(4)]))


def test_evaluation_between_steps_on_two_processes():
    run_on_ranks(2, evaluate_and_step, [("1F1B", 1), ("Interleaved1F1B", 2), ("ZBVZeroBubble", 2)])
