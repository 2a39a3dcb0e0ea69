import random

import pytest
import torch
from torch import nn

import attnres_rewrite as ar
from attnres_rewrite.api import plan_program
from attnres_rewrite.capture import capture
from attnres_rewrite.errors import PartitionError
from attnres_rewrite.passes.insert_reads import add_parameters, insert_reads
from attnres_rewrite.passes.partition import partition
from tests.networks import VOCAB, WIDTH, Gpt, Mlp

ids = torch.arange(16).reshape(2, 8) % VOCAB
BYTES = 2 * 8 * WIDTH * 8  # of one value, in float64


def rewritten(model, args, config):
    """Return the rewritten graph before its reads are scheduled, its parameters, and the updates of its streams."""
    captured = capture(model.double(), args, {}, {}, both_modes=False)
    planned = plan_program(captured.programs[captured.training], config)
    add_parameters(planned.program, planned.plans, config)
    updates = [update.add for plan in planned.plans for update in plan.stream.updates]
    names = [add.name for add in updates]
    insert_reads(planned.program.graph, planned.plans, config)
    planned.program.recompile()
    with torch.no_grad():
        for name, parameter in planned.program.named_parameters():
            if "attn_res" in name:
                parameter.add_(torch.randn_like(parameter))
    return planned.program, names


def cuts_after(program, config_reads, chosen):
    """Return, for each chosen state, the node that reads it first: the next stage starts there."""
    reads = [node for node in program.graph.nodes if "attn_res" in node.meta]
    assert len(reads) == config_reads
    return [reads[number] for number in chosen]


def chained(parts, args):
    """Run the stages one after the other, as ranks would."""
    values, out = {}, None
    for stage in parts.stages:
        given = {name: value for name, value in zip(("ids", "x"), args, strict=False)}
        inputs = [given.get(name, args[0]) for name in stage.inputs]
        out = stage.module(*inputs, *(values[name] for name in stage.reads))
        if stage is not parts.stages[-1]:
            values |= dict(zip(stage.makes, out, strict=True))
    return out


def assert_same(program, parts, args):
    wanted = program(*args)
    wanted.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in program.named_parameters()}
    for parameter in program.parameters():
        parameter.grad = None
    (found,) = chained(parts, args)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    found.square().sum().backward()
    for name, parameter in program.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chosen", [(1,), (2,), (0, 3), (1, 3), (0, 1, 2, 3, 4)])
def test_the_stages_are_the_model(chosen):
    program, _ = rewritten(Gpt(), (ids,), ar.AttnResConfig(block_size=2))
    parts = partition(program.graph, program, cuts_after(program, 6, chosen))
    assert len(parts.stages) == len(chosen) + 1
    assert_same(program, parts, (ids,))


def test_what_crosses_is_the_root_the_blocks_and_the_open_partial_sum():
    program, _ = rewritten(Gpt(), (ids,), ar.AttnResConfig(block_size=2))
    # after states 2, 3 and 4 of 6: the second cut lies inside a block
    parts = partition(program.graph, program, cuts_after(program, 6, (1, 2, 3)))
    facts = [(value.made, sorted(value.readers), value.num_bytes) for value in parts.values]
    assert facts == [(0, [1, 2, 3], BYTES), (0, [1, 2, 3], BYTES), (1, [2], BYTES), (2, [3], BYTES)]
    assert all(value.has_gradient for value in parts.values)
    # the partial sum becomes a block in the next stage
    assert [stage.makes for stage in parts.stages][3] == ()


def test_names_of_parameters_are_the_models_and_each_is_in_one_stage():
    program, _ = rewritten(Gpt(), (ids,), ar.AttnResConfig(block_size=2))
    parts = partition(program.graph, program, cuts_after(program, 6, (1, 3)))
    names = [name for stage in parts.stages for name, _ in stage.module.named_parameters()]
    # the head is tied to the embedding
    assert parts.tied == {"embed.weight": (0, 2)} or parts.tied == {"head.weight": (0, 2)}
    assert len(names) == len(set(names)) + 1
    for stage in parts.stages:
        for name, parameter in stage.module.named_parameters():
            assert parameter is program.get_parameter(name)


class WithMask(nn.Module):
    """A table made of the input's size and a mask made of the input: every layer uses both."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Mlp() for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, ids):
        table = torch.arange(ids.shape[1], dtype=torch.float64).cos()[:, None]
        mask = (ids != 3).to(torch.float64)[..., None]
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(self.norm(x) * table) * mask
        return self.norm(x)


def test_tables_and_masks_are_made_again_not_carried():
    program, _ = rewritten(WithMask(), (ids,), ar.AttnResConfig(num_blocks=4))
    parts = partition(program.graph, program, cuts_after(program, 4, (1,)))
    assert len(parts.values) == 3
    assert parts.stages[1].inputs == ("ids",)
    assert any("cos" in name for name in parts.stages[1].recomputed)
    assert_same(program, parts, (ids,))


class Cast(nn.Module):
    """Hands a cast of its root and a norm of it to both halves: cheaper made again than carried."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCAB, WIDTH), nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, ids):
        x = self.embed(ids)
        root = x * 2.0
        for layer in self.layers:
            x = x + layer(nn.functional.rms_norm(x, (WIDTH,)) + root.sigmoid())
        return nn.functional.rms_norm(x, (WIDTH,))


def test_cheap_results_are_made_again_from_what_crosses_anyway():
    program, _ = rewritten(Cast(), (ids,), ar.AttnResConfig(num_blocks=4))
    parts = partition(program.graph, program, cuts_after(program, 4, (1,)))
    # the root and two blocks; root * 2 follows from the root
    assert len(parts.values) == 3
    assert parts.stages[1].recomputed
    assert_same(program, parts, (ids,))


def test_random_cuts_of_random_block_sizes():
    draw = random.Random(0)
    for _ in range(6):
        size = draw.randint(1, 6)
        program, _ = rewritten(Gpt(depth=3), (ids,), ar.AttnResConfig(block_size=size))
        chosen = sorted(draw.sample(range(5), draw.randint(1, 4)))
        assert_same(program, partition(program.graph, program, cuts_after(program, 6, chosen)), (ids,))


def test_frozen_parameters_leave_values_without_a_gradient():
    model = Gpt()
    model.embed.weight.requires_grad_(False)
    program, _ = rewritten(model, (ids,), ar.AttnResConfig(block_size=2))
    parts = partition(program.graph, program, cuts_after(program, 6, (1,)))
    assert [value.has_gradient for value in parts.values] == [False, True]


class Written(nn.Module):
    """Every layer adds two values that are written into: a table of constants, and one with a slot from the input.

    `early` was read before the write: a stage that makes it again would see what was written.
    """

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCAB, WIDTH), nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, ids):
        x = self.embed(ids)
        table = torch.zeros(ids.shape[1], WIDTH, dtype=x.dtype)
        table[:, 0] = 1.0
        slots = x * 0.5
        early = slots.sigmoid()
        slots[:, 1] += x[:, 0]
        for layer in self.layers:
            x = x + layer(nn.functional.rms_norm(x, (WIDTH,)) + table + slots + early)
        return nn.functional.rms_norm(x, (WIDTH,))


# Once wrong: a later stage made such a value again without what was written into it.
@pytest.mark.parametrize("chosen", [(0,), (1, 2)])
def test_what_is_written_into_is_carried_or_made_again_with_the_write(chosen):
    program, _ = rewritten(Written(), (ids,), ar.AttnResConfig(block_size=2))
    parts = partition(program.graph, program, cuts_after(program, 4, chosen))
    assert {"zeros", "fill_"} <= set(parts.stages[-1].recomputed)
    assert {value.name: value.has_gradient for value in parts.values}["mul"]
    assert_same(program, parts, (ids,))


class Shared(nn.Module):
    """Its layers share a batch norm: each use moves the running statistics."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Mlp() for _ in range(4))
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.norm(x)


def test_a_buffer_that_several_stages_move_is_refused():
    program, _ = rewritten(Shared().train(), (torch.randn(8, WIDTH).double(),), ar.AttnResConfig(block_size=2))
    reads = cuts_after(program, 4, (1,))
    with pytest.raises(PartitionError, match=r"writes into norm\.num_batches_tracked, which stages \[0, 1\] use"):
        partition(program.graph, program, reads)


class Regions(nn.Module):
    """Under no_grad it counts its calls, draws noise for every layer, and follows the mean of biases."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCAB, WIDTH), nn.ModuleList(Mlp() for _ in range(4))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, ids):
        x = self.embed(ids)
        with torch.no_grad():
            self.seen.add_(1)
            noise = torch.rand(ids.shape[1], 1, dtype=x.dtype)
        for layer in self.layers:
            h = nn.functional.rms_norm(x, (WIDTH,))
            with torch.no_grad():
                self.mean.mul_(0.5).add_(layer.down.bias)
            x = x + layer(h + self.mean) * noise
        return nn.functional.rms_norm(x, (WIDTH,))


# Once wrong: every stage counted, and drew noise of its own
def test_what_is_drawn_or_written_under_no_grad_is_so_once():
    program, _ = rewritten(Regions().train(), (ids,), ar.AttnResConfig(block_size=2))
    with pytest.raises(PartitionError, match=r"writes into mean, which stages \[0, 1\] use"):
        partition(program.graph, program, cuts_after(program, 4, (1,)))
    parts = partition(program.graph, program, cuts_after(program, 4, (3,)))
    assert not parts.stages[1].recomputed
    torch.manual_seed(0)
    wanted = program(ids)
    program.mean.zero_()
    torch.manual_seed(0)
    (found,) = chained(parts, (ids,))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert program.seen.item() == 2


class TestBadCuts:
    def test_out_of_order(self):
        program, _ = rewritten(Gpt(), (ids,), ar.AttnResConfig(block_size=2))
        one, two = cuts_after(program, 6, (1, 3))
        with pytest.raises(PartitionError, match="order"):
            partition(program.graph, program, [two, one])

    def test_a_stage_without_parameters(self):
        program, _ = rewritten(Gpt(), (ids,), ar.AttnResConfig(block_size=2))
        first = next(node for node in program.graph.nodes if node.target is torch.ops.aten.embedding.default)
        with pytest.raises(PartitionError, match="stage 0 of 2 would own no parameter"):
            partition(program.graph, program, [first])
