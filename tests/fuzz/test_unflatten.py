"""Generated networks whose layers are called again: what the flat graph computes, with gradients, in both modes.

6 networks by default, 300 with `-m slow`. Those whose layers cannot be told apart are refused, and say why.
"""

import pytest
import torch
from torch import nn

import attnres_rewrite as ar

from .check import is_random, random_config
from .networks import build
from .specs import random_spec
from .test_backend import assert_alike, results, widened


def layer_lists(model: nn.Module, new: ar.RewrittenModule) -> list[str]:
    """Return patterns for the outermost lists of modules that read."""
    keys = list(new.state_dict())
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and any(key.startswith(f"{name}.") and ".attn_res." in key for key in keys)
    ]
    return [f"{name}.*" for name in found if not any(name.startswith(f"{other}.") for other in found)]


def check(seed: int) -> int:
    """Compare one network with its flat rewrite; return how many units it has, 0 where it is refused."""
    spec = random_spec(seed)
    made = build(spec)
    config = random_config(spec, made)
    model, args = widened(spec, made)
    new = ar.rewrite(model, args, config=config, dynamic_shapes={}, verify=False)
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            parameter.add_(torch.randn_like(parameter))
    patterns = layer_lists(model, new)
    if not patterns:
        return 0
    try:
        nested = ar.unflatten(new, patterns)
    except ar.PartitionError:
        # called more than once, or side by side
        assert spec.loops > 1 or len(patterns) > 1
        return 0
    for training in (True, False) if is_random(spec) else (model.training,):
        assert_alike(results(nested.train(training), args), results(new.train(training), args))
    return sum(node.op == "call_module" for node in nested.graph.nodes)


@pytest.mark.parametrize("seed", range(6))
def test_networks(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 300))
def test_many_networks(seed: int) -> None:
    check(seed)
