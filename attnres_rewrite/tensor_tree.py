"""A tree of modules -> its tensors, each once, with a table of all names; and back.

The table says of each name what it is (parameter, buffer, constant), on which device, and under which name its values
are stored: tied names are stored once, and are tied again in the tree that is made of them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnres_rewrite.module import attribute, constants_of


def tensors_of(new: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors to store, each once, and for every name what it is."""
    stored: dict[str, Tensor] = {}
    first_name: dict[int, str] = {}
    table: dict[str, Any] = {}
    for name, value, facts in _named_tensors(new):
        known = first_name.setdefault(id(value), name)
        if known == name:
            stored[name] = value.detach().clone(memory_format=torch.contiguous_format)
        table[name] = facts | {"stored_as": known, "device": str(value.device)}
    return stored, table


def _named_tensors(new: nn.Module) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    for prefix, module in new.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, value in module._parameters.items():
            if value is not None:
                yield dot + name, value, {"kind": "parameter", "requires_grad": value.requires_grad}
        for name, value in module._buffers.items():
            if value is not None:
                yield (
                    dot + name,
                    value,
                    {"kind": "buffer", "persistent": name not in module._non_persistent_buffers_set},
                )
        for name, value in constants_of(module).items():
            yield dot + name, value, {"kind": "constant"}


def add_tensors(
    tree: nn.Module, table: Mapping[str, Any], stored: Mapping[str, Tensor], device: torch.device | None = None
) -> None:
    """Put `stored` tensors into `tree` under every name of the table; modules that are missing are made.

    They go to `device`, or each to the one that the table has.

    They are copied: those that safetensors maps from a file lie at any multiple of their element's size, and matrix
    products round differently from weights that are not aligned as torch aligns its own.
    """
    made: dict[str, Tensor] = {}
    for name, entry in table.items():
        source = entry["stored_as"]
        if source not in made:
            value = stored[source].to(device or entry["device"], copy=True)
            is_parameter = entry["kind"] == "parameter"
            made[source] = nn.Parameter(value, entry["requires_grad"]) if is_parameter else value
        holder, leaf = holder_of(tree, name.rpartition(".")[0]), name.rpartition(".")[2]
        if entry["kind"] == "buffer":
            holder.register_buffer(leaf, made[source], persistent=entry["persistent"])
        else:
            setattr(holder, leaf, made[source])


def holder_of(tree: nn.Module, name: str) -> nn.Module:
    """Return the module of that name in `tree`, and make it if it is missing."""
    module = tree
    for part in name.split(".") if name else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = attribute(module, part)
    return module
