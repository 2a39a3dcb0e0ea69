"""A small model, attached and compiled without Inductor, beside the rewrite that it must be equal to."""

import copy

import torch

import attnres_rewrite as ar
from tests.networks import VOCAB, Gpt

CONFIG = ar.AttnResConfig(num_blocks=2)
QUICK = {"backend": "attnres", "options": {"backend": "aot_eager"}}
ids = torch.arange(16).reshape(2, 8) % VOCAB


def small(depth=2, **options):
    return Gpt(depth=depth, **options).double()


def attached(model=None, config=CONFIG, **options):
    """Return a compiled model with random queries and gains, and the rewrite it must be equal to."""
    model = model or small()
    new = ar.rewrite(copy.deepcopy(model), (ids,), config=config, verify=False, dynamic_shapes={})
    ar.attach(model, config, (ids,))
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    new.load_state_dict(model.state_dict())
    model.compile(**(options or QUICK))
    return model, new.train(model.training)


def assert_same(model, new, **tolerance):
    found, wanted = model(ids), new(ids)
    torch.testing.assert_close(found, wanted, **tolerance)
    weights = torch.randn_like(wanted)
    for module, out in ((model, found), (new, wanted)):
        module.zero_grad()
        (out * weights).sum().backward()
    gradients = dict(new.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, gradients[name].grad, **tolerance)
