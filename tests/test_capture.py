"""Mirrors attnres_rewrite/capture.py: every kind of model, its names, its shapes, and what is refused."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import attnres_rewrite as ar
from attnres_rewrite.capture import capture
from attnres_rewrite.records import FixedDim
from tests.networks import WIDTH, Gpt, gpt, ids

AUTO = torch.export.Dim.AUTO


def dynamo_graph(model: nn.Module, *args: Tensor, dynamic: bool | None) -> tuple[fx.GraphModule, list[Any]]:
    seen: list[tuple[fx.GraphModule, list[Any]]] = []

    def record(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append((gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=record, fullgraph=True, dynamic=dynamic)(*args)
    return seen[0]


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (ids(),), dynamic_shapes=({0: AUTO, 1: AUTO},), strict=False)


KINDS = {
    "module": lambda m: (m, (ids(),)),
    "exported program": lambda m: (exported(m), (ids(),)),
    "graph of torch.export": lambda m: (exported(m).module(), (ids(),)),
    "graph of symbolic_trace": lambda m: (fx.symbolic_trace(m), (ids(),)),
    "graph of Dynamo": lambda m: dynamo_graph(m, ids(), dynamic=None),
    "graph of Dynamo, dynamic": lambda m: dynamo_graph(m, ids(), dynamic=True),
}


class Traceable(nn.Module):
    """A residual network that symbolic_trace can follow too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.norms[0](x)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_rewritten_and_computes_the_same(kind):
    torch.manual_seed(0)
    model = Traceable().eval()
    given, args = KINDS[kind](model)
    new = ar.rewrite(given, args)
    assert new.report.verify.passed
    assert [stream.num_updates for stream in new.report.streams] == [4]
    result = new(*new.example_inputs.args)
    torch.testing.assert_close(result[0] if isinstance(result, tuple) else result, model(ids()))


@pytest.mark.parametrize("kind", ["exported program", "graph of torch.export", "graph of symbolic_trace"])
def test_a_graph_that_was_given_is_not_changed(kind):
    given, args = KINDS[kind](Traceable().eval())
    holder = given.module() if isinstance(given, torch.export.ExportedProgram) else given
    before = list(holder.state_dict()), str(given.graph)
    ar.rewrite(given, args, verify=False)
    assert before == (list(holder.state_dict()), str(given.graph))


def test_names_ties_and_the_very_parameters_survive():
    model = gpt()
    new = ar.rewrite(model, (ids(),), verify=False)
    assert new.head.weight is new.embed.weight is model.embed.weight
    for name, value in model.state_dict(keep_vars=True).items():
        assert new.state_dict(keep_vars=True)[name] is value


def test_copied_parameters_are_equal_tied_and_apart():
    model = gpt()
    new = ar.rewrite(model, (ids(),), share_parameters=False, verify=False)
    assert new.head.weight is new.embed.weight
    assert new.embed.weight is not model.embed.weight
    torch.testing.assert_close(new(ids()), model(ids()))


def test_batch_and_sequence_stay_dynamic():
    model = gpt()
    new = ar.rewrite(model, (ids(2, 5),), verify=False)
    assert new.report.capture.fixed_dims == ()
    assert new.report.capture.route == "torch.export(strict=False, dynamic shapes)"
    torch.testing.assert_close(new(ids(4, 9)), model(ids(4, 9)))


def test_a_batch_of_one_stays_dynamic_too():
    model = gpt()
    new = ar.rewrite(model, (ids(1, 5),))
    assert new.report.verify.passed
    assert new.report.capture.fixed_dims == ()
    for batch in (1, 3):
        torch.testing.assert_close(new(ids(batch, 7)), model(ids(batch, 7)))


class FixedLength(Gpt):
    """Adds a position table of one length."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.position = nn.Parameter(torch.randn(5, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def test_a_dimension_that_was_fixed_is_listed_and_checked_at_the_call():
    torch.manual_seed(0)
    new = ar.rewrite(FixedLength().eval(), (ids(2, 5),), verify=False)
    assert new.report.capture.fixed_dims == (FixedDim("ids", 1, 5),)
    assert new(ids(4, 5)).shape == (4, 5, WIDTH)
    with pytest.raises(ValueError, match="ids has size 9 in dimension 1; the program was captured for 5 only"):
        new(ids(2, 9))
    with pytest.raises(ValueError, match="ids has 1 dimensions; the program was captured for 2"):
        new(ids()[0])


@dataclass
class Output:
    logits: Tensor
    count: int


torch.export.register_dataclass(Output, serialized_type_name="tests.test_capture.Output")


class Structured(Gpt):
    """Takes nested inputs by name, returns a dataclass."""

    def forward(self, batch: dict[str, Tensor], scale: float = 1.0, mask: Tensor | None = None) -> Output:
        logits = super().forward(batch["ids"]) * scale
        return Output(logits if mask is None else logits * mask, 3)


def test_signature_and_output_structure_survive():
    torch.manual_seed(0)
    model = Structured(depth=2).eval()
    new = ar.rewrite(model, kwargs={"batch": {"ids": ids()}, "scale": 2.0}, verify=True)
    out = new({"ids": ids(3, 4)})
    assert isinstance(out, Output)
    assert out.count == 3
    torch.testing.assert_close(out.logits, model({"ids": ids(3, 4)}, scale=2.0).logits)
    torch.testing.assert_close(new(batch={"ids": ids()}, scale=2.0).logits, model({"ids": ids()}, scale=2.0).logits)


def test_modes_are_captured_once_when_they_do_not_differ_and_twice_when_they_do():
    same = capture(gpt(), (ids(),))
    assert same.programs[True] is same.programs[False]
    other = capture(gpt(dropout=0.1), (ids(),))
    assert other.programs[True] is not other.programs[False]


def test_the_capture_leaves_every_training_flag_as_it_was():
    model = gpt(dropout=0.1)
    model.layers[1].train()
    flags = {name: module.training for name, module in model.named_modules()}
    capture(model, (ids(),))
    assert flags == {name: module.training for name, module in model.named_modules()}


def test_an_exported_program_of_one_mode_says_so():
    new = ar.rewrite(exported(gpt(dropout=0.1)), (ids(),))
    assert new.report.capture.modes == ("eval",)
    assert not new.training
    with pytest.raises(NotImplementedError, match="captured in eval mode only"):
        new.train()


class OneMode(Gpt):
    """Skips a layer at random while it trains."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.training and torch.rand([]) < 0.5:
            return self.embed(ids)
        return super().forward(ids)


def test_a_mode_that_cannot_be_captured_is_left_out_with_a_note():
    torch.manual_seed(0)
    new = ar.rewrite(OneMode(depth=2).eval(), (ids(),))
    assert new.report.capture.modes == ("eval",)
    assert new.report.verify.passed
    (note,) = new.report.capture.notes
    assert note.startswith("train mode was not captured: control flow of OneMode depends on tensor values")
    with pytest.raises(NotImplementedError, match="train mode was not captured"):
        new.train()
    with pytest.raises(ar.GraphBreakError):
        ar.rewrite(OneMode(depth=2).train(), (ids(),))


class Branching(Gpt):
    """Leaves out a layer when the input says so."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if ids.sum() > 3:
            x = self.layers[0](x)
        return self.layers[1](x)


class Failing(Gpt):
    def forward(self, ids: Tensor) -> Tensor:
        raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("model", "args", "error", "message"),
    [
        pytest.param(
            Branching(),
            (ids(),),
            ar.GraphBreakError,
            r"depends on tensor values, at .*test_capture.py:\d+",
            id="branch",
        ),
        pytest.param(Failing(), (ids(),), ar.CaptureError, "KeyError.*no such thing", id="raises"),
        pytest.param(Gpt(), (torch.randn(2, 5, 3),), ar.CaptureError, "could not be captured", id="wrong dtype"),
        pytest.param(Gpt(), (ids(), ids()), ar.CaptureError, "too many positional", id="too many inputs"),
        pytest.param(Gpt(), (), ar.CaptureError, "missing a required argument", id="no inputs"),
        pytest.param(
            Gpt(),
            (ids().to("meta"),),
            ar.CaptureError,
            "is on cpu, its example inputs are on meta",
            id="another device",
        ),
    ],
)
def test_what_cannot_be_captured_is_refused_with_each_reason(model, args, error, message):
    with pytest.raises(error, match=message) as refusal:
        ar.rewrite(model, args)
    remedy = "torch.where" if error is ar.GraphBreakError else "First check that model"
    assert remedy in str(refusal.value)


def test_a_value_that_is_no_model_is_a_wrong_argument():
    with pytest.raises(TypeError, match="model is a function"):
        ar.rewrite(lambda x: x, (ids(),))


def test_given_dynamic_shapes_are_used_and_wrong_ones_refused():
    batch = torch.export.Dim("batch", min=2, max=64)
    new = ar.rewrite(gpt(), (ids(),), dynamic_shapes=({0: batch},), verify=False)
    assert new(ids(7, 5)).shape[0] == 7
    with pytest.raises(ValueError, match="dimension 1"):
        new(ids(2, 6))


class Keeping(Gpt):
    """Counts its calls in a tensor that is no buffer, and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.count, self.seen = torch.zeros(3), torch.ones(2)

    def forward(self, ids: Tensor) -> Tensor:
        self.count += 1
        self.seen = self.embed(ids)
        self.last = self.seen
        return super().forward(ids)


def test_tensors_that_are_plain_attributes_stay_as_they_are() -> None:
    model = Keeping()
    count, seen = model.count, model.seen
    capture(model, (ids(),))
    assert model.count is count
    assert model.seen is seen
    assert torch.equal(count, torch.zeros(3))
    assert not hasattr(model, "last")


def test_one_example_given_twice_is_two_inputs():
    class TwoTexts(Gpt):
        def forward(self, text: Tensor, other: Tensor) -> Tensor:
            return super().forward(text) + self.embed(other).sum(-1, keepdim=True)

    model, same = TwoTexts(depth=1).eval(), ids()
    for args, kwargs in (((same, same), {}), ((same,), {"other": same})):
        new = ar.rewrite(model, args, kwargs, dynamic_shapes={}, verify=False)
        torch.testing.assert_close(new(same, other=same.flip(0)), model(same, same.flip(0)))


def attention_dropout(x: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


def stochastic_depth(x: Tensor) -> Tensor:
    return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(0.5)


@pytest.mark.parametrize("draw", [attention_dropout, stochastic_depth])
def test_a_program_that_drops_at_random_is_of_train_mode(draw):
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return draw(x)

    program = torch.export.export(Dropping(), (torch.randn(2, 4, WIDTH),))
    assert list(capture(program).programs) == [True]


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_wrapper_of_several_processes_is_refused(one_process):
    model = nn.parallel.DistributedDataParallel(Gpt(depth=1))
    with pytest.raises(ar.CaptureError, match=r"DistributedDataParallel is around .*\n.*its \.module, and put"):
        capture(model, (ids(),))
    with pytest.raises(ar.CaptureError, match=r"DataParallel is around the model.*, at 0"):
        capture(nn.Sequential(nn.DataParallel(Gpt(depth=1))), (ids(),))


def test_sharded_parameters_are_refused(one_process):
    model = fully_shard(Gpt(depth=1), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ar.CaptureError, match=r"sharded \(DTensor\).*, at embed\.weight"):
        capture(model, (ids(),))
