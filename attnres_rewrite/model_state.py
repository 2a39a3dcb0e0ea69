"""Run a model that is not ours, and leave it as it was: its modes, its buffers, tensors that are plain attributes."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

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


def drop_kept_tables(model: nn.Module) -> None:
    """Put every module with a train() of its own into train mode and back: it drops what it kept of an evaluation.

    LeViT keeps a table in eval mode that it makes of a parameter. One made under no_grad() has no gradients, and a
    graph captured with it would hold a constant in the parameter's place.
    """
    for module in model.modules():
        # a module that torch.export made has one in its instance, which raises
        if type(module).train is not nn.Module.train and "train" not in vars(module):
            flags = {inner: inner.training for inner in module.modules()}
            for mode in (True, module.training):
                module.train(mode)
            for inner, flag in flags.items():
                inner.training = flag


@contextmanager
def plain_tensors_kept(model: nn.Module) -> Generator[None]:
    """Put back what a forward does to tensors that are plain attributes, or in dicts and lists that are.

    A count moves on, a fake tensor stays, a table that was made without gradients is kept for the next call.
    """
    before = {module: dict(vars(module)) for module in model.modules()}
    kept = [value for found in before.values() for value in found.values() if isinstance(value, torch.Tensor)]
    values = [value for value in kept if not value.is_meta]
    copies = [value.detach().clone() for value in values]
    containers = [(value, value.copy()) for found in before.values() for value in _containers(found)]
    try:
        yield
    finally:
        for container, items in containers:
            container.clear()
            container.update(items) if isinstance(container, dict) else container.extend(items)
        for module, found in before.items():
            for name, value in list(vars(module).items()):
                if isinstance(value, torch.Tensor) and found.get(name) is not value:
                    del module.__dict__[name]
            module.__dict__.update({name: value for name, value in found.items() if isinstance(value, torch.Tensor)})
        with torch.no_grad():
            for value, copied in zip(values, copies, strict=True):
                if not torch.equal(value, copied):
                    value.copy_(copied)


def _containers(attributes: dict[str, Any]) -> Iterator[dict[Any, Any] | list[Any]]:
    """Yield the dicts and lists among a module's attributes, and those in them, but for torch's own."""
    todo = [value for name, value in attributes.items() if name not in _OF_TORCH]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if type(value) in (dict, list) and id(value) not in seen:
            seen.add(id(value))
            yield value
            todo += value.values() if isinstance(value, dict) else value


_OF_TORCH = frozenset(vars(nn.Module()))


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
