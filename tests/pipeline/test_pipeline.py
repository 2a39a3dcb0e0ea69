"""What a user may do with a built pipeline: step after step, evaluation, bad inputs; one process runs all stages."""

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import attnres_rewrite as ar
from attnres_rewrite.errors import PartitionError
from attnres_rewrite.pipeline.schedules import runs_here
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


def those_that_run(schedules: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(name, virtual) for name, virtual in schedules if runs_here(name)]


# Once wrong: torch divides what an earlier step left a second time
@pytest.mark.parametrize(
    ("schedule", "virtual"), those_that_run([("LoopedBFS", 2), ("GPipe", 1), ("InterleavedZeroBubble", 2)])
)
def test_gradients_of_several_steps_add_up(schedule, virtual):
    pipeline = built(rewritten(Gpt(depth=2)), schedule, virtual)
    pipeline.step(batch, target=target)
    once = [parameter.grad.clone() for parameter in pipeline.parameters()]
    pipeline.evaluate(batch, target=target)
    pipeline.step(batch, target=target)
    torch.testing.assert_close([parameter.grad for parameter in pipeline.parameters()], [2 * grad for grad in once])


# Once wrong: torch asked the stage behind, on the same rank, for gradients
@pytest.mark.parametrize(("schedule", "virtual"), those_that_run([("LoopedBFS", 2), ("ZBVZeroBubble", 2), ("1F1B", 1)]))
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


# Once an error about scalar outputs, from within torch
def test_what_was_frozen_when_it_was_partitioned():
    new = rewritten(Gpt(depth=2))
    new.embed.weight.requires_grad_(False)
    pipeline = built(new)
    pipeline.step(batch, target=target)
    new.embed.weight.requires_grad_(True)
    with pytest.raises(RuntimeError) as raised:
        pipeline.step(batch, target=target)
    assert "embedding would have a gradient, and had none when the model was partitioned" in str(raised.value.__cause__)


class Returning(Gpt):
    """It returns a parameter beside its logits, for a loss that looks at it."""

    def forward(self, ids):
        return super().forward(ids), self.norm.weight


# Once wrong: after the first microbatch the parameter had no gradient
@pytest.mark.parametrize(
    "schedule", [name for name, _ in those_that_run([("LoopedBFS", 2), ("InterleavedZeroBubble", 2)])]
)
def test_a_parameter_that_is_returned_learns(schedule):
    def loss(out, wanted):
        return loss_of(out, wanted) + out[1].square().sum()

    new = rewritten(Returning(depth=2))
    reference = copy.deepcopy(new)
    built(new, schedule, loss_fn=loss).step(batch, target=target)
    for ids, wanted in zip(batch.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
        (loss(reference(ids), wanted) / MICROBATCHES).backward()
    torch.testing.assert_close(new.norm.weight.grad, reference.norm.weight.grad)


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


# Once wrong: a step that was refused had scaled them by the number of microbatches
def test_a_refused_step_leaves_the_gradients():
    pipeline = built(rewritten(Gpt(depth=2)))
    pipeline.step(batch, target=target)
    before = [parameter.grad.clone() for parameter in pipeline.parameters()]
    with pytest.raises(ValueError, match="3 microbatches"):
        pipeline.step(batch[:4], target=target)
    torch.testing.assert_close([parameter.grad for parameter in pipeline.parameters()], before, rtol=0, atol=0)


# Once wrong: the next step drew what the step before it had drawn
def test_a_refused_evaluation_changes_no_draw_of_a_step():
    new = rewritten(Gpt(depth=2, dropout=0.5).train())
    outs = []
    for refused in (False, True):
        pipeline = built(copy.deepcopy(new))
        first = pipeline.step(batch, target=target)
        if refused:
            with pytest.raises(ValueError, match="3 microbatches"):
                pipeline.evaluate(batch[:4], target=target)
        outs.append([first, pipeline.step(batch, target=target)])
    torch.testing.assert_close(outs[0], outs[1])


# Once wrong: broadcast
@pytest.mark.parametrize("part", ["", "optimizer."])
def test_a_checkpoint_of_another_shape_is_refused_whole(part):
    pipeline = built(rewritten(Gpt(depth=2)))
    optimizer = torch.optim.Adam(pipeline.parameters())
    train(pipeline, optimizer)
    before = {name: value.clone() for name, value in pipeline.state_dict(optimizer).items()}
    name = "optimizer.norm.weight.exp_avg" if part else "norm.weight"
    wrong = {key: value + 1 for key, value in before.items()} | {name: torch.ones(1)}
    with pytest.raises(ValueError, match=rf"{name} is \[1\] in the state dict, and \[16\] here"):
        pipeline.load_state_dict(wrong, optimizer)
    torch.testing.assert_close(pipeline.state_dict(optimizer), before, rtol=0, atol=0)


# Once wrong: a checkpoint was loaded into one of the copies on this rank
def test_a_checkpoint_reaches_every_copy_of_a_tied_parameter():
    new = rewritten(Gpt(depth=2))
    first, second = built(new), built(copy.deepcopy(new))
    optimizers = [torch.optim.Adam(pipeline.parameters(), lr=0.1) for pipeline in (first, second)]
    train(first, optimizers[0])
    state = second.state_dict(optimizers[1])
    for name, value in first.state_dict(optimizers[0]).items():
        state[name].copy_(value)  # as torch.distributed.checkpoint loads
    second.load_state_dict(state, optimizers[1])
    for pipeline, optimizer in zip((first, second), optimizers, strict=True):
        train(pipeline, optimizer)
    assert len(second.tied[0].copies) == 2
    torch.testing.assert_close(second.parameters(), first.parameters())


def train(pipeline: ar.Pipeline, optimizer: torch.optim.Optimizer) -> None:
    pipeline.step(batch, target=target)
    pipeline.reduce_tied_gradients()
    optimizer.step()
    optimizer.zero_grad()


# Once wrong: the state was that after a first step, with decay in its moments; gradients that waited for one were lost
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.ASGD])
def test_asking_for_the_state_of_an_optimizer_changes_nothing(kind):
    new = rewritten(Gpt(depth=2))
    ends = []
    for asks in (False, True):
        pipeline = built(copy.deepcopy(new))
        optimizer = kind(pipeline.parameters(), lr=0.1, weight_decay=0.1)
        pipeline.step(batch, target=target)
        if asks:
            pipeline.state_dict(optimizer)
        optimizer.step()
        ends.append(pipeline.parameters())
    torch.testing.assert_close(*ends)


# Once an AttributeError of torch
@pytest.mark.parametrize("wrong", [{"labels": target}, [target]])
def test_a_target_that_is_no_tensor_is_named(wrong):
    with pytest.raises(TypeError, match=f"the target is a {type(wrong).__name__}, not a tensor"):
        built(rewritten(Gpt(depth=2))).step(batch, target=wrong)


# Once wrong: the sums of all copies were added up a second time
def test_gradients_of_tied_copies_are_added_up_once():
    pipeline = built(rewritten(Gpt(depth=2)))
    optimizer = torch.optim.SGD(pipeline.parameters(), lr=0.0)
    for set_to_none in (True, False, False):
        pipeline.step(batch, target=target)
        pipeline.reduce_tied_gradients()
        for run in (pipeline.reduce_tied_gradients, lambda: pipeline.step(batch, target=target)):
            with pytest.raises(RuntimeError, match=r"head.weight still has the sum .*zero_grad\(\) before"):
                run()
        pipeline.evaluate(batch, target=target)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_clipping_is_that_of_the_whole_model(norm_type):
    new = rewritten(Gpt(depth=2))
    reference = copy.deepcopy(new)
    for ids, wanted in zip(batch.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
        (loss_of(reference(ids), wanted) / MICROBATCHES).backward()
    pipeline = built(new)
    pipeline.step(batch, target=target)
    pipeline.reduce_tied_gradients()
    assert pipeline.tied[0].num_copies == 2
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1, norm_type)
    assert norm > 0.1
    torch.testing.assert_close(pipeline.clip_grad_norm_(0.1, norm_type), norm)
    for name, parameter in pipeline.named_parameters():
        torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad, rtol=1e-9, atol=1e-14)
    with pytest.raises(RuntimeError, match=r"head.weight still has the sum"):
        pipeline.step(batch, target=target)


def test_what_cannot_be_clipped_is_refused_and_left_alone():
    pipeline = built(rewritten(Gpt(depth=2)))
    assert pipeline.clip_grad_norm_(1.0) == 0.0  # no gradients yet
    pipeline.step(batch, target=target)
    with pytest.raises(RuntimeError, match=r"comes after reduce_tied_gradients\(\), and head.weight is not added up"):
        pipeline.clip_grad_norm_(1.0)
    pipeline.reduce_tied_gradients()
    with pytest.raises(ValueError, match=r"norm_type is 0.0"):
        pipeline.clip_grad_norm_(1.0, 0.0)
    first, last = pipeline.parameters()[0], pipeline.parameters()[-1]
    last.grad.fill_(math.inf)
    before = first.grad.clone()
    with pytest.raises(RuntimeError, match=r"the norm of the gradients of all ranks is inf: nothing was clipped"):
        pipeline.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert torch.equal(first.grad, before)


def test_gradients_of_half_precision_are_clipped():
    pipeline = built(rewritten(Gpt(depth=2)))
    for parameter in pipeline.parameters():
        parameter.data = parameter.data.bfloat16()
        parameter.grad = torch.full_like(parameter, 4.0)
    pipeline.reduce_tied_gradients()
    norm = pipeline.clip_grad_norm_(1.0)
    assert norm.dtype == torch.float32
    assert norm > 1.0
    torch.testing.assert_close(pipeline.clip_grad_norm_(1.0), torch.tensor(1.0), rtol=0.01, atol=0)


class Targeted(Gpt):
    """Its last stage takes an input called target."""

    def forward(self, ids, target):
        return super().forward(ids) * target[..., None]


# Once an error of each step that asked for what it was given
def test_an_input_with_the_name_of_an_argument_of_step():
    with pytest.raises(PartitionError, match="stage 1 takes an input that is called target"):
        built(rewritten(Targeted(depth=2), example, example))


# Once wrong: torch could not save the optimizer any more
def test_an_optimizer_of_some_parameters():
    pipeline = built(rewritten(Gpt(depth=2)))
    optimizer = torch.optim.Adam(pipeline.parameters()[:2])
    names = [name for name in pipeline.state_dict(optimizer) if name.startswith("optimizer.")]
    assert len(names) == 2 * len(("step", "exp_avg", "exp_avg_sq"))
    optimizer.state_dict()


class Buffered(Gpt):
    """It has a buffer that its state dict has not, and makes a constant."""

    def __init__(self):
        super().__init__(depth=2)
        self.register_buffer("scale", torch.linspace(1, 2, 31), persistent=False)
        self.register_buffer("shift", torch.linspace(0, 1, 31))

    def forward(self, ids):
        return super().forward(ids) * self.scale + self.shift + torch.tensor([1.5])


def test_weights_that_are_mapped_from_a_file_are_not_copied(tmp_path):
    torch.save(Gpt(depth=2).double().state_dict(), tmp_path / "weights.pt")
    with torch.device("meta"):
        model = Gpt(depth=2)
    model.load_state_dict(torch.load(tmp_path / "weights.pt", mmap=True, weights_only=True), assign=True)
    places = {parameter.data_ptr() for parameter in model.parameters()}
    assert places <= {parameter.data_ptr() for parameter in built(rewritten(model)).parameters()}


# Once wrong: KeyError, as the stage had the buffer in its state dict
def test_what_the_state_dict_of_the_model_leaves_out():
    new = rewritten(Buffered())
    pipeline = built(new)
    assert pipeline.state_dict().keys() <= new.state_dict().keys()
    assert "shift" in pipeline.state_dict()
    pipeline.load_state_dict(new.state_dict())


def evaluate_and_step(schedules: list[tuple[str, int]]) -> None:
    torch.manual_seed(0)
    new = rewritten(Gpt(depth=4))
    weights = [weakref.ref(parameter) for parameter in new.parameters()]
    # once they waited for each other
    with pytest.raises(PartitionError, match="rank 1 has another plan or schedule than rank 0"):
        built(new, "1F1B", 1, loss_fn=loss_of if dist.get_rank() else None)
    reference = copy.deepcopy(new)
    pipeline = built(new, "1F1B", 1, n_microbatches=4)
    del new
    gc.collect()
    # tied weights have a copy on both ranks, and a rank has what it runs
    assert sum(weight() is not None for weight in weights) == len(pipeline.parameters()) < len(weights)
    for schedule, virtual in schedules:
        pipeline = built(copy.deepcopy(reference), schedule, virtual, n_microbatches=4)
        ids = batch.repeat(2, 1)[:8]
        inputs = (ids,) if dist.get_rank() == 0 else ()
        for _ in range(2):
            out = pipeline.evaluate(*inputs, target=ids)
            pipeline.step(*inputs, target=ids)
        if any(stage.is_last for stage in pipeline.stages):
            torch.testing.assert_close(out, torch.cat([reference(x) for x in ids.chunk(4)]))


def test_evaluation_between_steps_on_two_processes():
    schedules = those_that_run([("1F1B", 1), ("Interleaved1F1B", 2), ("ZBVZeroBubble", 2)])
    run_on_ranks(2, evaluate_and_step, schedules)
