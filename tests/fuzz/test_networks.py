"""The generator itself: specs print and rebuild, networks run, and `known` is in the exported graph."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .graphs import innermost_module
from .negatives import NegativeSpec, negative_specs
from .networks import Generated, build
from .specs import CHOICES, CYCLES, NetworkSpec, random_spec, why_not

SEEDS = range(20)
ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(out: Any) -> list[Tensor]:
    """Return the tensors of any output structure."""
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def adds_of(graph: fx.GraphModule, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return the FQNs in `known` in the order in which their adds are in the graph."""
    found = (innermost_module(node) for node in graph.graph.nodes if node.target in ADDS)
    return tuple(fqn for fqn in found if fqn in known)


def capture(made: Generated, train: bool) -> fx.GraphModule:
    """Export the network in one mode."""
    made.model.train(train)
    program = torch.export.export(made.model, made.args, strict=False).module()
    assert isinstance(program, fx.GraphModule)
    return program


def test_every_choice_occurs_within_300_seeds() -> None:
    specs = [random_spec(seed) for seed in range(300)]
    for name, values in CHOICES.items():
        assert {getattr(spec, name) for spec in specs} == set(values), name
    for name, entries in CYCLES.items():
        assert {entry for spec in specs for entry in getattr(spec, name)} == set(entries), name


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("topology", "encoder_decoder"), ("layout", "channels_first")),
        (("layout", "grid"), ("skip", "unet")),
        (("loops", 2), ("inject", "every")),
        (("residual", "(x + attn) + mlp"), ("shared_norm", True)),
        (("scores", "alibi"), ("rotary", True)),
        (("norm_place", "branch_output"), ("residual", "x + (attn + mlp)")),
        (("layer_scalar", "x *= s"), ("scaling", "both")),
        (("reader", "collect"), ("output", "dataclass")),
    ],
)
def test_features_combine(first: tuple[str, Any], second: tuple[str, Any]) -> None:
    specs = (random_spec(seed) for seed in range(3000))
    assert any(all(getattr(spec, name) == value for name, value in (first, second)) for spec in specs)


@pytest.mark.parametrize("seed", range(300))
def test_repr_rebuilds_the_spec(seed: int) -> None:
    spec = random_spec(seed)
    assert eval(repr(spec)) == spec == random_spec(seed)
    assert why_not(spec) is None


def test_a_conflict_is_refused() -> None:
    with pytest.raises(ValueError, match="windows are cut from an image"):
        build(NetworkSpec(layout="grid"))


@pytest.mark.parametrize("seed", SEEDS)
def test_network(seed: int) -> None:
    spec = random_spec(seed)
    made, again = build(spec), build(spec)
    assert made.known == again.known
    assert made.model.state_dict().keys() == again.model.state_dict().keys()
    for a, b in zip(made.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        eager = tensors(made.model(*made.args))
        assert all(out.isfinite().all() for out in eager)
        assert all(map(torch.equal, eager, tensors(again.model(*again.args))))

    assert len(made.known) == (1 if spec.topology == "single" else 2)
    modules = dict(made.model.named_modules())
    for stream in made.known:
        assert len(stream) >= 2
        assert all(fqn in modules for fqn in stream)

    for train in (False, True):
        graph = capture(made, train)
        for stream in made.known:
            assert adds_of(graph, stream) == stream
        with torch.no_grad():
            captured = tensors(graph(*made.args))
        assert len(captured) == len(eager)
        if not train:
            torch.testing.assert_close(captured, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_trainable_networks_give_gradients(seed: int) -> None:
    made = build(random_spec(seed))
    if not made.trainable:
        return
    made.model.train()
    outputs = tensors(made.model(*made.args))
    sum(out.square().sum() for out in outputs if out.is_floating_point()).backward()
    gradients = [p.grad for p in made.model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.slow
def test_most_graphs_are_small() -> None:
    sizes = sorted(len(capture(build(random_spec(seed)), False).graph.nodes) for seed in range(0, 60, 5))
    assert sizes[len(sizes) // 2] < 450
    assert sizes[-1] < 2000


@pytest.mark.parametrize("negative", negative_specs(), ids=lambda negative: negative.name)
def test_negative_runs_and_exports(negative: NegativeSpec) -> None:
    model, args = negative.build()
    assert model(*args).isfinite().all()
    torch.export.export(model, args, strict=False)
