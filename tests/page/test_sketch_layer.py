"""What is drawn of a layer, before and after the rewrite."""

import pytest
from torch import nn

import attnres_rewrite as ar
from attnres_rewrite.page.choose_layer import Layer, choose_layer
from attnres_rewrite.page.sketch_after import sketch_after
from attnres_rewrite.page.sketch_before import sketch_before
from attnres_rewrite.page.svg import draw
from tests.networks import WIDTH, gpt, gpt_of, ids


def rewritten(model, **config):
    new = ar.rewrite(model, (ids(),), config=ar.AttnResConfig(**config), dynamic_shapes={}, verify=False)
    program = new.programs[new.training]
    return program, program.plans[0]


def sketches(program, plan):
    layer = choose_layer(plan)
    return sketch_before(program, plan, layer), sketch_after(program, plan, layer)


def described(sketch):
    return [f"{box.title}: {box.note}" for box in sketch.boxes]


def wires(sketch):
    return {(wire.start, wire.end, wire.tint) for wire in sketch.wires}


def test_before():
    before, _ = sketches(*rewritten(gpt(4), num_blocks=4))
    assert described(before) == [
        "x₂: the root and 2 updates, added up",
        "norm_1: LayerNorm",
        "attn: Attention",
        "add: x₃ = x₂ + u₃",
        "norm_2: LayerNorm",
        "mlp: Mlp",
        "add: x₄ = x₃ + u₄",
        "x₄: to what follows",
    ]
    assert wires(before) == {
        *{(0, 1, "stream"), (1, 2, "flow"), (2, 3, "flow"), (0, 3, "stream")},
        *{(3, 4, "stream"), (4, 5, "flow"), (5, 6, "flow"), (3, 6, "stream"), (6, 7, "stream")},
    }


def test_after_in_two_phases():
    _, after = sketches(*rewritten(gpt(4), num_blocks=4, schedule="two_phase"))
    assert described(after) == [
        "x₀: the root",
        "b₁: block 1: updates 1 to 2",
        "phase 1: 2 reads, 2 finished sources",
        "read of x₂: the mix of phase 1, as it is",
        "norm_1: LayerNorm",
        "attn: Attention",
        "read of x₃: in one pass with layer norm",
        "mlp: Mlp",
        "add: u₄ completes block 2",
        "phase 1: 2 reads, 3 finished sources",
        "read of x₄: the mix of phase 1, as it is",
    ]
    assert wires(after) == {
        *{(0, 2, "root"), (1, 2, "block"), (2, 3, "mix"), (3, 4, "flow"), (4, 5, "flow")},
        *{(2, 6, "mix"), (5, 6, "partial"), (6, 7, "flow"), (5, 8, "partial"), (7, 8, "flow")},
        *{(0, 9, "root"), (1, 9, "block"), (8, 9, "block"), (9, 10, "mix")},
    }


def test_after_with_direct_reads():
    _, after = sketches(*rewritten(gpt(3), num_blocks="full", schedule="direct"))
    reads = [row for row, box in enumerate(after.boxes) if box.kind == "read"]
    assert [after.boxes[row].note for row in reads] == [f"softmax over {count} sources" for count in (3, 4, 5)]
    assert [sum(wire.end == row for wire in after.wires) for row in reads] == [3, 4, 5]


STEPS = {
    "sequential": lambda layer, x: layer.n1(x) * 0.5 + x,
    "parallel": lambda layer, x: x + layer.f(layer.n1(x)) + layer.g(layer.n1(x)),
    "sandwich": lambda layer, x: x + layer.n2(layer.f(layer.n1(x))),
    "layer scale": lambda layer, x: x + layer.gain * layer.f(layer.n1(x)),
    "scaled stream": lambda layer, x: 0.9 * x + layer.f(layer.n1(x)),
    "scaled by a parameter": lambda layer, x: (x + layer.f(layer.n1(x))) * layer.gain,
}


def test_gates_keep_the_running_sum():
    _, after = sketches(*rewritten(gpt(3), num_blocks=3, schedule="direct", gate=True))
    assert described(after) == [
        "x₀: the root",
        "b₁: block 1: updates 1 to 2",
        "x: the running sum so far",
        "read of x₂: softmax over 2 sources",
        "mul: 1 operation",
        "add: the gated mix joins the running sum",
        "norm_1: LayerNorm",
        "attn: Attention",
        "add: x₃ = x₂ + u₃",
        "read of x₃: softmax over 3 sources",
        "mul: 1 operation",
        "add: the gated mix joins the running sum",
        "norm_2: LayerNorm",
        "mlp: Mlp",
        "add: u₄ completes block 2",
        "read of x₄: softmax over 3 sources",
    ]
    assert {wire for wire in wires(after) if wire[2] == "stream"} >= {
        (2, 5, "stream"),
        (2, 8, "stream"),
        (8, 11, "stream"),
    }


def test_a_recency_bias_is_no_box_of_its_own():
    _, after = sketches(*rewritten(gpt(3), num_blocks=3, schedule="two_phase", recency_bias=1.0))
    assert not [box for box in after.boxes if "bias" in box.title]


@pytest.mark.parametrize("schedule", ["direct", "two_phase"])
@pytest.mark.parametrize("name", STEPS)
def test_every_read_drawn_has_all_its_sources(name, schedule):
    program, plan = rewritten(gpt_of(STEPS[name], depth=4), block_size=3, schedule=schedule)
    layer = choose_layer(plan)
    num_sources = {read.state: read.num_sources for read in plan.reads}
    for sketch in sketches(program, plan):
        assert all(wire.start < wire.end for wire in sketch.wires)
        fed = {wire.end for wire in sketch.wires}
        assert fed == {row for row, box in enumerate(sketch.boxes) if box.kind != "input"}
        assert {wire.start for wire in sketch.wires} == set(range(len(sketch.boxes) - 1))
        inputs = [box.title for box in sketch.boxes if box.kind == "input"]
        assert len(inputs) == len(set(inputs))
    drawn = 0
    for row, box in enumerate(sketch.boxes):
        if box.kind == "read":
            state = next(state for state in num_sources if box.title == f"read of {subscript(state)}")
            assert sources_into(sketch, row) == num_sources[state], box
            drawn += 1
    assert drawn == 1 + sum(layer.first - 1 <= state < layer.last for state in num_sources)


class CastingNorm(nn.LayerNorm):
    """Casts what it reads; in float32 that is the stream itself, and the add behind it reads the cast."""

    def forward(self, x):
        return super().forward(x.float())


def test_the_running_sum_does_not_come_out_of_a_norm_that_casts():
    model = gpt_of(lambda layer, x: (x + layer.f(layer.n1(x))) * layer.gain, depth=4)
    for layer in model.layers:
        layer.n1 = CastingNorm(WIDTH)
    before, _ = sketches(*rewritten(model, num_blocks=2))
    assert described(before)[1] == "mul: 1 operation"
    into_adds = [wire for wire in before.wires if wire.tint == "stream" and before.boxes[wire.end].kind == "add"]
    assert [before.boxes[wire.start].title for wire in into_adds] == ["mul"]


def subscript(state: int) -> str:
    return "x" + "".join(chr(ord("₀") + int(digit)) for digit in str(state))


def sources_into(sketch, row: int) -> int:
    """Count the sources of a read: its own, and those of the phase 1 it takes part in."""
    total = 0
    for wire in sketch.wires:
        if wire.end == row:
            total += 1 if wire.tint in ("root", "block", "partial") else 0
            total += sources_into(sketch, wire.start) if wire.tint == "mix" else 0
    return total


@pytest.mark.parametrize(("depth", "layer"), [(1, "layers.0"), (2, "layers.1"), (6, "layers.2")])
def test_the_layer_is_an_early_one_with_enough_sources(depth, layer):
    _, plan = rewritten(gpt(depth), block_size=3)
    assert choose_layer(plan).title == layer


def test_updates_without_a_layer_go_in_pairs():
    class Flat(type(gpt())):
        def forward(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = x + layer.attn(layer.norm_1(x))
                x = x + layer.mlp(layer.norm_2(x))
            return self.head(self.norm(x))

    program, plan = rewritten(Flat(3).eval(), num_blocks=3)
    assert choose_layer(plan) == Layer("", 3, 4)
    before, _ = sketches(program, plan)
    assert "layers.1.attn: Attention" in described(before)


def test_a_skip_between_two_layers_is_no_layer():
    class UNet(type(gpt())):
        def forward(self, ids):
            x, seen = self.embed(ids), []
            for number, layer in enumerate(self.layers):
                x = layer(x if number < 2 else x + seen.pop())
                seen += [x] * (number < 2)
            return self.head(self.norm(x))

    _, plan = rewritten(UNet(4).eval(), block_size=3)
    assert plan.stream.updates[4].kind == "skip"
    # the skip reads state 4, the first of three sources
    assert choose_layer(plan).title == "layers.2"


def test_a_single_layer_is_drawn_from_its_root():
    program, plan = rewritten(gpt(1), num_blocks=1)
    before, after = sketches(program, plan)
    assert described(before)[0] == "x₀: the root"
    assert described(after)[0] == "x₀: the root"


def test_names_are_escaped_and_cut_in_the_middle():
    program, plan = rewritten(gpt(2), num_blocks=2)
    _, after = sketches(program, plan)
    boxes = list(after.boxes)
    boxes[0] = type(boxes[0])("input", "<b>" + "long" * 20 + "end", "&")
    svg = draw(type(after)(tuple(boxes), after.wires), "one", "<i>")
    assert "<b>" not in svg
    assert "<i>" not in svg
    assert "&lt;b&gt;longlong" in svg
    assert "…" in svg
    assert 'id="one-title"' in svg
