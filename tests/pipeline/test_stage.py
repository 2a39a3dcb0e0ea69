"""One process plays every rank with the real stage class, in random legal orders of actions.

Hops are the hand-over that torch uses between stages of one rank. No sockets, no second process.
"""

import random

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.torch_version import TorchVersion

import attnres_rewrite as ar
from attnres_rewrite.pipeline.build import value_examples, with_all_gradients
from attnres_rewrite.pipeline.planner import MODES
from attnres_rewrite.pipeline.schedules import runs_here
from attnres_rewrite.pipeline.split_backward import join_parameters
from attnres_rewrite.pipeline.stage import BlockCacheStage, RankStore, StageModule
from tests.networks import VOCAB, WIDTH, Gpt

ids = torch.arange(12).reshape(2, 6) % VOCAB


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stages_of(plan: ar.PipelinePlan, num_microbatches: int, split: bool) -> list[BlockCacheStage]:
    count = len(plan.stages)
    examples = value_examples(plan)
    stores = [RankStore() for _ in range(plan.num_ranks)]
    found = []
    for number, (graph, routes) in enumerate(zip(plan.stages, plan.routes, strict=True)):
        is_first, is_last = number == 0, number == count - 1
        if split and not is_first:
            join_parameters(graph.module, len(graph.inputs))
        stage = BlockCacheStage(
            StageModule(graph, routes, is_first=is_first, is_last=is_last, splits_backward=split),
            routes,
            stores[routes.rank],
            examples,
            number,
            count,
            torch.device("cpu"),
            input_args=(torch.empty(ids.shape, dtype=torch.long, device="meta"),),
            output_args=(torch.empty(*ids.shape, VOCAB, dtype=torch.float64, device="meta").requires_grad_(),),
            inputs=graph.inputs,
        )
        prepare(stage, num_microbatches)
        found.append(stage)
    return found


def prepare(stage: BlockCacheStage, num_microbatches: int) -> None:
    """Do what a schedule does before its first step; private to torch, and not of the stage."""
    from torch.distributed.pipelining import _utils

    stage.has_backward = True
    options = {}
    if hasattr(_utils, "InferenceMode"):  # torch 2.13
        stage._inference_mode = _utils.InferenceMode.STATIC
        options["has_backward"] = True
    stage._prepare_forward_infra(num_microbatches, (ids,) if stage.is_first else None, None, **options)
    stage._prepare_backward_infra(num_microbatches)


def play(
    stages: list[BlockCacheStage], inputs: Tensor, targets: Tensor, split: bool, draw: random.Random
) -> list[Tensor]:
    """Run forwards and backwards in a random order that respects what needs what."""
    last, losses = len(stages) - 1, {}
    ready = [("forward", 0, microbatch) for microbatch in range(len(inputs))]
    while ready:
        action, number, microbatch = ready.pop(draw.randrange(len(ready)))
        stage = stages[number]
        if action == "forward":
            x = inputs[microbatch]
            by_name = {} if number == 0 else {name: x for name in stage.inputs}
            out = stage.forward_one_chunk(microbatch, (x,) if number == 0 else (), by_name)
            if number == last:
                losses[microbatch] = loss_of(out, targets[microbatch])
                ready.append(("backward", number, microbatch))
            else:
                stages[number + 1].set_local_fwd_input(out, microbatch)
                ready.append(("forward", number + 1, microbatch))
        elif action == "backward":
            stage.backward_one_chunk(microbatch, loss=losses.get(microbatch), full_backward=not split)
            if split:
                ready.append(("weights", number, microbatch))
            if number:
                stages[number - 1].set_local_bwd_input(stage.get_local_bwd_output(microbatch), microbatch)
                ready.append(("backward", number - 1, microbatch))
        else:
            stage.backward_weight_one_chunk(microbatch)
    return [losses[microbatch].detach() for microbatch in range(len(inputs))]


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), target.flatten())


def rewritten(config: ar.AttnResConfig, depth: int = 4, tied: bool = False) -> ar.RewrittenModule:
    model = Gpt(depth=depth).double()
    if not tied:
        model.head.weight = torch.nn.Parameter(torch.randn_like(model.head.weight))
    return rewritten_from(model, config)


def rewritten_from(model: torch.nn.Module, config: ar.AttnResConfig) -> ar.RewrittenModule:
    new = ar.rewrite(model, (ids,), config=config, verify=False, dynamic_shapes={})
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            parameter.add_(torch.randn_like(parameter))
    return new


def assert_learns_the_same(new: ar.RewrittenModule, plan: ar.PipelinePlan, seed: int, *, split: bool) -> None:
    if split and not runs_here("ZBVZeroBubble"):
        pytest.skip("build_pipeline refuses schedules that split backwards on this version of torch")
    draw = random.Random(seed)
    count = draw.randint(1, 4)
    inputs, targets = torch.randint(0, VOCAB, (2, count, *ids.shape))
    stages = stages_of(plan, count, split)
    found = play(stages, inputs, targets, split, draw)
    assert all(stage.store.is_empty for stage in stages)
    frozen = [name for name, p in new.named_parameters() if not p.requires_grad]
    assert all(new.get_parameter(name).grad is None for name in frozen)
    gradients = {name: p.grad.clone() for name, p in new.named_parameters() if p.requires_grad}
    new.zero_grad()
    for microbatch, loss in enumerate(found):
        wanted = loss_of(new(inputs[microbatch]), targets[microbatch])
        wanted.backward()
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, new.get_parameter(name).grad, rtol=1e-11, atol=1e-12)
    new.zero_grad()


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("placement", ["loop", "v"])
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_are_those_of_the_model(mode, placement, split):
    new = rewritten(ar.AttnResConfig(block_size=2))
    for seed, (ranks, virtual) in enumerate([(2, 2), (3, 2), (2, 3), (4, 2)]):
        plan = ar.partition(new, ranks, virtual, placement=placement, mode=mode)
        assert_learns_the_same(new, plan, seed, split=split)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters_send_no_gradients(mode):
    new = rewritten(ar.AttnResConfig(block_size=2))
    freeze(new, new.embed, new.layers.get_submodule("0"))
    plan = ar.partition(new, 2, 2, cuts="blocks", mode=mode)
    assert not plan.values[0].has_gradient
    assert_learns_the_same(new, plan, 0, split=False)


# torch's split backward fails on an input without a gradient
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_frozen", [0, 1, 3])
def test_frozen_parameters_under_a_split_backward(mode, num_frozen):
    new = rewritten(ar.AttnResConfig(block_size=2))
    freeze(new, new.embed, *(new.layers.get_submodule(str(number)) for number in range(num_frozen)))
    plan = with_all_gradients(ar.partition(new, 2, 2, cuts="blocks", mode=mode))
    assert_learns_the_same(new, plan, 0, split=True)


class Late(Gpt):
    """Its upper layers share a weight but no bias, and add an embedding that nothing below has."""

    def __init__(self):
        super().__init__(depth=4)
        self.late = torch.nn.Embedding(VOCAB, WIDTH)
        for layer in self.layers:
            layer.mlp.down.weight = self.layers[0].mlp.down.weight

    def forward(self, ids):
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            x = layer(x if number != 2 else x + torch.tanh(self.late(ids)))
        return self.head(self.norm(x))


# Once wrong: such gradients were lost, or None
@pytest.mark.parametrize("mode", MODES)
def test_parameters_that_a_split_backward_would_lose(mode):
    # a block begins with the late embedding, which the second stage computes and sends
    new = rewritten_from(Late().double(), ar.AttnResConfig(block_size=4))
    plan = ar.partition(new, 3, cuts=["layers.1.attn_res.0", "layers.2.attn_res.0"], mode=mode)
    assert plan.stages[1].inputs == ("ids",)
    assert_learns_the_same(new, plan, 0, split=True)


class Skip(Gpt):
    """What its first layer is given goes round the others to the last one; one norm and one weight are used twice."""

    def __init__(self):
        super().__init__(depth=6)
        self.side = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        x = self.embed(ids)
        around = torch.tanh(self.side(self.norm(x)))
        for layer in self.layers[:-1]:
            x = layer(x)
        x = self.layers[-1](x + self.side(self.norm(x)) * around)
        return self.head(self.norm(x))


# Once wrong: such a value was never stored, and a split backward freed what lies between two uses of a parameter
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize(("virtual", "placement"), [(2, "v"), (3, "loop")])
def test_a_value_for_a_later_stage_of_the_same_rank_alone(virtual, placement, split):
    new = rewritten_from(Skip().double(), ar.AttnResConfig(block_size=2))
    plan = ar.partition(new, 2, virtual, placement=placement)
    assert set(plan.routes[0].kept) - set(plan.routes[0].sent) == {"tanh"}
    assert_learns_the_same(new, plan, 0, split=split)


# Once sent as it was: the next rank read the bytes of bfloat16 as float32
def test_what_autocast_lowers_has_the_dtype_of_the_plan_on_the_wire():
    new = rewritten_from(Skip().float(), ar.AttnResConfig(block_size=4))
    (stage, _) = stages_of(plan := ar.partition(new, 2), 1, split=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = stage.forward_one_chunk(0, (ids,), {})
    assert "tanh" in plan.routes[0].sent
    assert [(value.dtype, value.requires_grad) for value in out] == [(torch.float32, True)] * 4


def test_a_stage_that_makes_something_else_than_the_plan_has():
    new = rewritten_from(Skip().float(), ar.AttnResConfig(block_size=4))
    (stage, _) = stages_of(ar.partition(new, 2), 1, split=False)
    stage.submod.double()
    with pytest.raises(RuntimeError) as raised:
        stage.forward_one_chunk(0, (ids,), {})
    assert "stage 0 made embedding as torch.float64 [2, 6, 16], and the plan has torch.float32" in str(
        raised.value.__cause__
    )


class Phases(Gpt):
    """A complex value that it learns goes round its layers, beside a filter of which it makes two uses."""

    def __init__(self):
        super().__init__(depth=3)
        self.turn, self.filter = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Parameter(torch.randn(WIDTH // 2, 2))

    def forward(self, ids):
        x = self.embed(ids)
        phases = torch.view_as_complex(torch.tanh(self.turn(x)).unflatten(-1, (-1, 2)))
        for layer in self.layers:
            turned = torch.view_as_complex(self.filter) * phases.exp() + torch.view_as_complex(self.filter)
            x = x + layer.attn(layer.norm_1(x)) * torch.view_as_real(turned).flatten(-2)
            x = layer(x)
        return self.head(self.norm(x))


# Once an error that something was not frozen any more
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("mode", MODES)
def test_complex_values_have_gradients(mode, split):
    new = rewritten_from(Phases().double(), ar.AttnResConfig(block_size=2))
    plan = ar.partition(new, 2, 2, mode=mode)
    assert any(example.is_complex() for example in value_examples(plan).values())
    plan = with_all_gradients(plan) if split else plan
    assert_learns_the_same(new, plan, 0, split=split)


def freeze(new: ar.RewrittenModule, *modules: torch.nn.Module) -> None:
    """Freeze modules, but not the reads in them."""
    for module in modules:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("attn_res" in name)


def random_case(seed: int) -> None:
    draw = random.Random(seed)
    new = rewritten(ar.AttnResConfig(block_size=draw.choice([1, 2, 3, 5, 8])), tied=draw.random() < 0.3)
    ranks, virtual = draw.choice([(1, 3), (2, 1), (2, 2), (2, 3), (3, 2), (4, 2)])
    layers = [f"layers.{number}" for number in range(1, 4)]
    cuts = "balanced" if ranks * virtual - 1 > 3 else sorted(draw.sample(layers, ranks * virtual - 1))
    plan = ar.partition(new, ranks, virtual, cuts=cuts, placement=draw.choice(["loop", "v"]), mode=draw.choice(MODES))
    split = draw.random() < 0.4
    assert_learns_the_same(new, plan, seed, split=split and runs_here("ZBVZeroBubble"))


@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in (6, 12, 18))])
def test_random_plans(first):
    for seed in range(first, first + 6):
        random_case(seed)


# Once wrong: what a stage returned was detached in place by a split backward that still needed it.
@pytest.mark.parametrize("seed", [27, 47])
def test_random_plans_that_failed_once(seed):
    random_case(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(24, 500, 20))
def test_many_random_plans(first):
    for seed in range(first, min(first + 20, 500)):
        random_case(seed)


class TestBuild:
    """What build_pipeline refuses; what it builds is run by test_build.py."""

    def build(self, plan, schedule, **options):
        return ar.build_pipeline(plan, schedule, n_microbatches=4, device="cpu", loss_fn=loss_of, **options)

    def test_another_number_of_processes(self):
        plan = ar.partition(rewritten(ar.AttnResConfig(block_size=2)), 2)
        with pytest.raises(ValueError, match="for 2 ranks, the group has 1"):
            self.build(plan, "1F1B")

    def test_another_placement(self):
        plan = ar.partition(rewritten(ar.AttnResConfig(block_size=2)), 1, 2)
        with pytest.raises(ValueError, match="places stages as a v, the plan as a loop"):
            self.build(plan, "ZBVZeroBubble")

    def test_a_split_backward_on_an_older_torch(self, monkeypatch):
        plan = ar.partition(rewritten(ar.AttnResConfig(block_size=2)), 1, 2, placement="v")
        monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1+cu130"))
        with pytest.raises(ValueError, match=r"ZBVZeroBubble needs torch 2.13 or newer, and this is 2.12.1\+cu130"):
            self.build(plan, "ZBVZeroBubble")

    @pytest.mark.parametrize(("schedule", "says"), [("1F1B", "runs 1 stage"), ("Fancy", "must be one of GPipe")])
    def test_a_schedule_that_does_not_fit(self, schedule, says):
        plan = ar.partition(rewritten(ar.AttnResConfig(block_size=2)), 1, 2)
        with pytest.raises(ValueError, match=says):
            self.build(plan, schedule)

    def test_one_process_runs_all_stages(self):
        new = rewritten(ar.AttnResConfig(block_size=2))
        pipeline = self.build(ar.partition(new, 1, 2), "LoopedBFS")
        assert len(pipeline.stages) == 2
        assert len(pipeline.parameters()) == len(list(new.parameters()))


def test_a_checkpoint_of_the_stages_is_one_of_the_model():
    new = rewritten(ar.AttnResConfig(block_size=2), tied=True)
    plan = ar.partition(new, 1, 2)
    pipeline = ar.build_pipeline(plan, "LoopedBFS", n_microbatches=2, device="cpu", loss_fn=loss_of)
    state = {name: value + 1.0 for name, value in pipeline.state_dict().items()}
    other = rewritten(ar.AttnResConfig(block_size=2), tied=True)
    # both names of the tied parameter, too
    assert state.keys() == other.state_dict().keys()
    other.load_state_dict(state)
    pipeline.load_state_dict(other.state_dict())
    for name, value in pipeline.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])
    with pytest.raises(KeyError):
        pipeline.load_state_dict({})


class TestDeposits:
    KEY = (0, "block", 1)

    def test_they_are_added_up(self):
        store = RankStore()
        for gradient in (torch.ones(2), None, torch.full((2,), 2.0)):
            store.hand_in(self.KEY, gradient)
        torch.testing.assert_close(store.collect(self.KEY, 3), torch.full((2,), 3.0))
        assert store.is_empty

    @pytest.mark.parametrize("expected", [0, 2])
    def test_a_lost_or_a_doubled_one_raises(self, expected):
        store = RankStore()
        store.hand_in(self.KEY, torch.ones(2))
        with pytest.raises(RuntimeError, match=f"1 gradients were handed in for block .* the plan has {expected}"):
            store.collect(self.KEY, expected)

    def test_one_tensor_that_is_handed_in_twice_is_not_written_into(self):
        store, gradient = RankStore(), torch.ones(2)
        for _ in range(3):
            store.hand_in(self.KEY, gradient)
        torch.testing.assert_close(gradient, torch.ones(2))
