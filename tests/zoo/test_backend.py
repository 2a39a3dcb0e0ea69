"""The zoo sample through torch.compile(backend="attnres"): what rewrite() computes, outputs and every gradient."""

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

pytest.importorskip("transformers", reason="the zoo is built from transformers: pip install attnres-rewrite[zoo]")

import attnres_rewrite as ar
from tests.zoo.builders import Spec, hand_counted
from tests.zoo.known import skip_without_its_library

CONFIG = ar.AttnResConfig(block_size=2)
LIMIT = 1e-10
DRAWS = 9
# Dynamo makes an instance of an autograd function
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # Mamba layers ask for torch's version
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    # rotations of queries and keys as complex numbers
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),
]
# models whose originals cannot run in float64, compiled or not, and what torch says of them
NOT_IN_FLOAT64 = {
    "xglm": "value cannot be converted to type float without overflow",
    "diffusers_kandinsky5": "mat1 and mat2 must have the same dtype",
}
# models that torch.compile with aot_eager cannot run in float64
NOT_COMPILED = NOT_IN_FLOAT64 | {"qwen3_next": "view size is not compatible with input tensor's size and stride"}
# sizes that depend on data are traced with fullgraph=True alone, and are beyond Inductor
DATA_DEPENDENT = {"diffusers_mochi": "to have been codegen-ed"}
if torch.__version__ < (2, 13):
    NOT_COMPILED |= dict.fromkeys(["mixtral", "deepseek_v3"], "Could not guard on data-dependent expression")


# what Dynamo writes in its own way: parallel adds, experts, an autograd function, in-place adds, skips
DEFAULT_RUN = "gptj mixtral bloom nanogpt_in_place nanogpt_unet timm_vit"


def _rewritten(default: str) -> list[object]:
    specs = [spec for spec in hand_counted() if not isinstance(spec.expected, str)]
    chosen = default.split()
    return [pytest.param(s, id=s.name, marks=() if s.name in chosen else pytest.mark.slow) for s in specs]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


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


def _pair(spec: Spec) -> tuple[nn.Module, ar.RewrittenModule, dict[str, Any]]:
    """Return an attached model with random queries and gains, the same rewritten, and inputs; all in float64."""
    skip_without_its_library(spec)
    torch._dynamo.reset()
    inputs = pytree.tree_map(lambda value: _cast(value, torch.float64), spec.inputs())
    model = spec.build().double()
    twin = ar.rewrite(copy.deepcopy(model), (), inputs, config=CONFIG, dynamic_shapes={}, verify=False)
    ar.attach(model, CONFIG, (), inputs)
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    assert model.state_dict().keys() == twin.state_dict().keys()
    twin.load_state_dict(model.state_dict())
    return model, twin, inputs


@pytest.mark.parametrize("spec", _rewritten(DEFAULT_RUN))
def test_the_backend_computes_what_rewrite_does(spec: Spec) -> None:
    model, twin, inputs = _pair(spec)
    if spec.name in NOT_COMPILED:
        with ar.original(model), pytest.raises(RuntimeError, match=NOT_COMPILED[spec.name]):
            _results(torch.compile(model, backend="aot_eager", fullgraph=True), inputs)
        pytest.skip(f"torch.compile cannot run the original: {NOT_COMPILED[spec.name]}")
    model.compile(backend="attnres", fullgraph=spec.name in DATA_DEPENDENT, options={"backend": "aot_eager"})
    outputs, gradients = _results(model, inputs)
    wanted, wanted_gradients = _results(twin, inputs)
    assert len(outputs) == len(wanted)
    for found, right in zip(outputs, wanted, strict=True):
        assert _relative_error(found, right) < LIMIT
    assert gradients.keys() == wanted_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in wanted_gradients.values())
    for name, right in wanted_gradients.items():
        assert (gradients[name] - right).abs().max().item() < LIMIT * largest, name


def _distances(results: tuple[list[Tensor], dict[str, Tensor]], exact: tuple[list[Tensor], dict[str, Tensor]]) -> float:
    """Return the largest relative error of the outputs, and of all gradients together."""
    outputs = max(_relative_error(one.double(), other) for one, other in zip(results[0], exact[0], strict=True))
    names = sorted(exact[1])
    found, right = (torch.cat([of[1][name].double().flatten() for name in names]) for of in (results, exact))
    return max(outputs, ((found - right).norm() / right.norm()).item())


def _draw_reads(model: nn.Module, seed: int) -> None:
    """Draw queries whose logits are about one: larger ones make a network whose rounding errors grow without bound."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=noise)
            if name.endswith("key_norm"):
                parameter.copy_(1 + 0.5 * drawn)
            elif "attn_res" in name:
                parameter.copy_(drawn / parameter.numel() ** 0.5)


@pytest.mark.parametrize("spec", _rewritten("gpt2"))
def test_inductor_in_float32_is_within_twice_the_rounding_of_eager(spec: Spec) -> None:
    """In the mean of draws of queries and gains: in one draw either may have the luck of a few roundings."""
    model, exact, inputs = _pair(spec)
    if spec.name in NOT_IN_FLOAT64:
        with pytest.raises(RuntimeError, match=NOT_IN_FLOAT64[spec.name]):
            _results(exact, inputs)
        pytest.skip("the original does not run in float64, compiled or not")
    single = pytree.tree_map(lambda value: _cast(value, torch.float32), spec.inputs())
    if spec.name in DATA_DEPENDENT:
        with pytest.raises(RuntimeError, match=DATA_DEPENDENT[spec.name]):
            _results(torch.compile(spec.build().float(), fullgraph=True), single)
        pytest.skip("Inductor cannot compile the original")
    model.float()
    model.compile(backend="attnres")
    eager = ar.rewrite(spec.build().float(), (), single, config=CONFIG, dynamic_shapes={}, verify=False)
    ratios = []
    for seed in range(DRAWS):
        _draw_reads(model, seed)
        for twin in (exact, eager):
            twin.load_state_dict(model.state_dict())
        for each in (model, exact, eager):
            each.zero_grad()
        right = _results(exact, inputs)
        rounding = _distances(_results(eager, single), right)
        ratios.append(_distances(_results(model, single), right) / rounding)
    assert statistics.geometric_mean(ratios) <= 2, ratios
