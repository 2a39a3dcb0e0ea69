"""Generated networks through torch.compile(backend="attnres"): what rewrite() computes, with gradients, in both modes.

3 networks by default, 500 with `-m slow`. Random numbers are mostly drawn in one order, so a seed gives both the same.
They run in float64, in which their depth and their large queries make no noise of rounding, but for those that cast to
float32 themselves. A wrong graph is off by far more than either.
"""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import attnres_rewrite as ar

from .check import is_random, random_config
from .networks import Generated, build
from .specs import NetworkSpec, random_spec

LIMIT = 1e-3
Results = tuple[list[Tensor], dict[str, Tensor]]


def results(model: nn.Module, args: tuple[Any, ...], backend: str | None = None) -> Results:
    """Return the outputs of a seeded call, and the gradients of a weighted sum of them."""
    run = model if backend is None else torch.compile(model, backend=backend)
    model.zero_grad()
    torch.manual_seed(3)
    outputs = [leaf for leaf in pytree.tree_leaves(run(*args)) if isinstance(leaf, Tensor)]
    generator = torch.Generator().manual_seed(4)
    weighted = [
        (out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs if out.requires_grad
    ]
    torch.stack(weighted).sum().backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def widened(spec: NetworkSpec, made: Generated) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a network and its inputs in float64, where it does not cast to float32."""
    if spec.casts != "none":
        return made.model, made.args
    widen = lambda leaf: leaf.double() if leaf.is_floating_point() else leaf  # noqa: E731
    return made.model.double(), pytree.tree_map_only(Tensor, widen, made.args)


def assert_alike(found: Results, wanted: Results) -> None:
    """Compare outputs and gradients, each with the largest of its kind."""
    assert len(found[0]) == len(wanted[0])
    for one, other in zip(found[0], wanted[0], strict=True):
        torch.testing.assert_close(one, other, rtol=LIMIT, atol=LIMIT * other.abs().max().item())
    assert found[1].keys() == wanted[1].keys()
    largest = max(gradient.abs().max().item() for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).abs().max().item() <= LIMIT * largest, name


# the experts of some networks pick tokens by torch.nonzero, at which Dynamo ends a graph otherwise
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def check(seed: int) -> None:
    """Compare one network, compiled, with its rewrite."""
    torch._dynamo.reset()
    spec = random_spec(seed)
    made = build(spec)
    config = random_config(spec, made)
    model, args = widened(spec, made)
    plain = copy.deepcopy(model)
    new = ar.rewrite(copy.deepcopy(model), args, config=config, dynamic_shapes={}, verify=False)
    ar.attach(model, config, args)
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    new.load_state_dict(model.state_dict())
    model.compile(backend="attnres", options={"backend": "aot_eager"})
    for training in (True, False) if is_random(spec) else (model.training,):
        try:
            found = results(model.train(training), args)
        except RuntimeError as error:
            # aot_eager keeps views of what it made contiguous or not: then it runs neither the original nor the rewrite
            with pytest.raises(RuntimeError), ar.original(model):
                results(model, args)
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                results(new.train(training), args, backend="aot_eager")
            continue
        try:
            assert_alike(found, results(new.train(training), args))
        except AssertionError:
            if not training:
                raise
            # aot_eager draws some dropouts in another order, those of the original as well
            with pytest.raises(AssertionError), ar.original(model):
                assert_alike(results(model, args), results(plain.train(), args))
            assert_alike(found, results(new, args, backend="aot_eager"))


# those of the first dozen that compile in the fewest seconds
QUICK = (5, 7, 9)


@pytest.mark.parametrize("seed", QUICK)
def test_networks(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", sorted(set(range(500)) - set(QUICK)))
def test_many_networks(seed: int) -> None:
    check(seed)
