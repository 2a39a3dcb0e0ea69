"""Run a model that is not ours, and leave it as it was: its modes, its buffers, tensors that are plain attributes."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Generator[None]:
    """Put every submodule in one mode, unless it is the model's own, and restore each flag after."""
    if model.training == training:
        yield
        return
    flags = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def plain_tensors_kept(model: nn.Module) -> Generator[None]:
    """Put back what a forward does to tensors that are plain attributes: a count moves on, a fake tensor stays."""
    before = {module: dict(vars(module)) for module in model.modules()}
    kept = [value for found in before.values() for value in found.values() if isinstance(value, torch.Tensor)]
    values = [value for value in kept if not value.is_meta]
    copies = [value.detach().clone() for value in values]
    try:
        yield
    finally:
        for module, found in before.items():
            for name, value in list(vars(module).items()):
                if isinstance(value, torch.Tensor) and found.get(name) is not value:
                    del module.__dict__[name]
            module.__dict__.update({name: value for name, value in found.items() if isinstance(value, torch.Tensor)})
        with torch.no_grad():
            for value, copied in zip(values, copies, strict=True):
                if not torch.equal(value, copied):
                    value.copy_(copied)


@contextmanager
def buffers_kept(model: nn.Module) -> Generator[None]:
    """Give buffers their values again, and the very tensors: a forward may assign others."""
    kept = [
        (module, name, value, value.detach().clone())
        for module in model.modules()
        for name, value in module._buffers.items()
        if value is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, value, copied in kept:
                module._buffers[name] = value
                value.copy_(copied)
