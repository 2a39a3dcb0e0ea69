"""Mirrors attnres_rewrite/moving.py: a rewrite moves to another device. Meta is one that every machine has."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

import attnres_rewrite as ar
from attnres_rewrite.moving import move_graph
from tests.networks import WIDTH, Gpt, ids

CONFIG = ar.AttnResConfig(num_blocks=2)


class Masked(nn.Module):
    """Makes positions, a mask, a table under no_grad and a constant in its forward, as models do."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = Gpt(depth=2)
        self.register_buffer("scale", torch.ones(WIDTH), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        with torch.no_grad():
            table = torch.outer(positions.to(torch.float32), torch.arange(WIDTH, device=ids.device)).cos()
        x = self.gpt.embed(ids) + table.to(self.scale.dtype) * self.scale
        for layer in self.gpt.layers:
            x = layer(x)
        x = self.gpt.norm(x).masked_fill((positions > 3).unsqueeze(-1), 0.0)
        return self.gpt.head(x) * torch.tensor([1.0, 2.0])[1].to(x.device)


@functools.cache
def masked() -> tuple[nn.Module, ar.RewrittenModule]:
    torch.manual_seed(0)
    model = Masked().train()
    new = ar.rewrite(model, (ids(),), config=CONFIG, verify=False)
    for parameter in ar.attnres_parameters(new):
        nn.init.normal_(parameter)
    return model, new


def runs_on(new: nn.Module, device: str) -> bool:
    return new(ids().to(device)).device.type == device


@pytest.mark.parametrize("mode", [True, False])
def test_all_that_a_graph_makes_moves_along(mode):
    new = copy.deepcopy(masked()[1]).train(mode).to("meta")
    assert runs_on(new, "meta")
    assert runs_on(new.train(not mode), "meta")


def test_example_inputs_are_there_when_it_comes_back():
    _, new = masked()
    back = copy.deepcopy(new).to("meta").to_empty(device="cpu")
    back.load_state_dict(new.state_dict())
    back.scale.fill_(1.0)
    assert ar.verify(back).passed
    torch.testing.assert_close(back(ids()), new(ids()), rtol=0, atol=0)


def test_a_copy_stays_where_it_is():
    _, new = masked()
    expected = new(ids())
    for moved in (copy.deepcopy(new), ar.unflatten(copy.deepcopy(new), "gpt.layers.*")):
        moved.to("meta")
        torch.testing.assert_close(new(ids()), expected, rtol=0, atol=0)
        assert ar.verify(new).passed


def test_layers_that_are_called_move_along():
    model = ar.unflatten(copy.deepcopy(masked()[1]), "gpt.layers.*").to("meta")
    assert runs_on(model, "meta")
    assert runs_on(model.eval(), "meta")


def test_what_was_rewritten_without_memory_computes_the_same_when_it_has_some():
    _, new = masked()
    with torch.device("meta"):
        model = Masked()
    found = ar.rewrite(model, (ids().to("meta"),), config=CONFIG, verify=False).to_empty(device="cpu")
    found.load_state_dict(new.state_dict())
    found.scale.fill_(1.0)
    torch.testing.assert_close(found(ids()), new(ids()), rtol=0, atol=0)
    assert ar.verify(found, (ids(),)).passed


def test_a_constant_that_lost_its_numbers_on_meta():
    class Scaled(Gpt):
        def forward(self, ids: Tensor) -> Tensor:
            logits = super().forward(ids)
            return logits * torch.tensor([2.0], device=logits.device)

    with torch.device("meta"):
        model = Scaled(depth=2)
    new = ar.rewrite(model, (ids().to("meta"),), config=CONFIG, verify=False)
    with pytest.raises(ar.CaptureError, match=r"is on the meta device: its numbers are lost.*\n.*torch.tensor\(number"):
        new.to_empty(device="cpu")


def test_what_is_tied_stays_tied():
    new = copy.deepcopy(masked()[1]).to("meta").to_empty(device="cpu")
    assert new.gpt.head.weight is new.gpt.embed.weight
    assert len({id(value) for value in new.parameters()}) == len({id(value) for value in masked()[1].parameters()})


def test_saved_on_one_device_and_loaded_on_another(tmp_path):
    _, new = masked()
    ar.save(new, tmp_path / "new")
    loaded = ar.load(tmp_path / "new", device="meta")
    assert runs_on(loaded, "meta")
    assert {value.device.type for value in (*loaded.parameters(), *loaded.buffers())} == {"meta"}
    loaded = ar.load(tmp_path / "new", device="cpu")
    torch.testing.assert_close(loaded(ids()), new(ids()), rtol=0, atol=0)


def test_passes_see_where_it_is_now():
    new = copy.deepcopy(masked()[1]).to("meta")
    plan = ar.partition(new, 2)
    assert plan.model_hash == ar.partition(masked()[1], 2).model_hash
    program = new.programs[new.training]
    assert {
        node.meta["val"].device.type for node in program.original.nodes if node in program.plans[0].stream.states
    } == {"meta"}


def test_a_change_of_precision_moves_nothing():
    new = copy.deepcopy(masked()[1])
    graphs = dict(new.graphs)
    assert new.to(torch.float64).graphs == graphs


def test_parameters_that_moved_without_the_graph():
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = Gpt(depth=2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.gpt(ids).to(torch.float64)

    new = ar.rewrite(Casts(), (ids(),), config=CONFIG, verify=False)
    for module in new.modules():  # as model.cuda() moves the parameters that the two share
        for name, value in module._parameters.items():
            module._parameters[name] = nn.Parameter(value.to("meta"))
    with pytest.raises(TypeError, match=r"with its method to\('meta'\)"):
        new(ids().to("meta"))
    assert runs_on(new.to("meta"), "meta")


def test_autocast_inside_is_that_of_the_device():
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = Gpt(depth=2)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            x = self.gpt(ids)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x, (x @ x.mT).to(torch.float32)

    new = ar.rewrite(Casts(), (ids(),), config=CONFIG, verify=False)
    graph = new.graphs[new.training]
    (call,) = graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_autocast)
    assert call.args[0] == "cpu"
    for node in graph.nodes:
        node.meta.pop("val", None)  # torch records none of a device that is not there
    move_graph(graph, torch.device("cuda"))
    assert call.args[0] == "cuda"


# Once wrong: torch's pass writes the names of devices, and the check of what is captured wanted a device
def test_a_program_that_torch_moved_can_be_rewritten():
    program = move_to_device_pass(torch.export.export(Masked().eval(), (ids(),)), "meta")
    new = ar.rewrite(program, *program.example_inputs, verify=False)
    assert runs_on(new, "meta")
