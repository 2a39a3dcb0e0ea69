"""The zoo sample through torch.compile(backend="attnres"): what rewrite() computes, outputs and every gradient."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

pytest.importorskip("transformers", reason="the zoo is built from transformers: pip install attnres-rewrite[zoo]")

import attnres_rewrite as ar
from tests.zoo.builders import Spec, hand_counted
from tests.zoo.known import NEEDS_TIMM
from tests.zoo.test_zoo import DEFAULT_RUN

CONFIG = ar.AttnResConfig(block_size=2)
LIMIT = 1e-10


def _rewritten() -> list[object]:
    specs = [spec for spec in hand_counted() if not isinstance(spec.expected, str)]
    chosen = DEFAULT_RUN.split()
    return [pytest.param(s, id=s.name, marks=() if s.name in chosen else pytest.mark.slow) for s in specs]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _results(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the float outputs, and the gradients of a weighted sum of them."""
    torch.manual_seed(1)
    leaves = pytree.tree_leaves(model(**inputs))
    outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    generator = torch.Generator().manual_seed(2)
    loss = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs if out.grad_fn)
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [out.detach() for out in outputs], gradients


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)).item() if wanted.numel() else 0.0


@pytest.mark.parametrize("spec", _rewritten())
def test_the_backend_computes_what_rewrite_does(spec: Spec) -> None:
    if spec.family == "timm" or spec.name in NEEDS_TIMM:
        pytest.importorskip("timm", reason="a timm model: pip install attnres-rewrite[zoo]")
    torch._dynamo.reset()
    inputs = pytree.tree_map(_double, spec.inputs())
    model = spec.build().double()
    twin = ar.rewrite(copy.deepcopy(model), (), inputs, config=CONFIG, dynamic_shapes={}, verify=False)
    ar.attach(model, CONFIG, (), inputs)
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    assert model.state_dict().keys() == twin.state_dict().keys()
    twin.load_state_dict(model.state_dict())
    model.compile(backend="attnres", options={"backend": "aot_eager"})
    outputs, gradients = _results(model, inputs)
    wanted, wanted_gradients = _results(twin, inputs)
    assert len(outputs) == len(wanted)
    for found, right in zip(outputs, wanted, strict=True):
        assert _relative_error(found, right) < LIMIT
    assert gradients.keys() == wanted_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in wanted_gradients.values())
    for name, right in wanted_gradients.items():
        assert (gradients[name] - right).abs().max().item() < LIMIT * largest, name
