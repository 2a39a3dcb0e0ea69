"""initialize(): values for a model that was built on the meta device, of which this process holds a part.

    with torch.device("meta"): model = Network(config)   ->  rewrite  ->  unflatten, fully_shard  ->  initialize
                                                                      ->  partition, build_pipeline

A module at a time gets memory on the device, alone, and is given to the code that initialises it; what was made is
copied into the part, or into its shard. No process ever holds the whole model. Random numbers follow from a seed and
the module's name: a parameter starts alike wherever the model is cut, and in all its copies.

What has memory and no values yet is full of NaN, or of the least integer: so what was left out is found.
"""

import copy
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from attnres_rewrite.read_parameters import start_value

Init = Callable[[str, nn.Module], object]


def initialize(part: nn.Module, model: nn.Module, init: Init, *, seed: int = 0) -> None:
    """Give the parameters and buffers of a rewritten model their first values, those of its reads included.

    Args:
        part: What `rewrite` or `unflatten` returned, with memory: part.to_empty(device=...). Its modules may be wrapped
            in activation checkpoints, compiled, and sharded by fully_shard. `Pipeline.initialize` does the same for
            the stages of a rank.
        model: The model that was rewritten, on the meta device. It is not changed.
        init: Called as init(name, module) under torch.no_grad for every module of `model` that has parameters or
            buffers of its own in `part`, with a copy of it that has all of its own and no submodules. It sets every
            number in them. `lambda name, module: model._init_weights(module)` for a model of transformers. A tied
            parameter is what the last of its modules makes it, as after model.apply().
        seed: Of the random numbers that `init` draws from torch.

    Raises:
        ValueError: `part` has something that `model` lacks or has in another shape, is on the meta device, or `init`
            left a parameter or a buffer as it was.
    """
    values = [*part.named_parameters(remove_duplicate=False), *part.named_buffers(remove_duplicate=False)]
    fill(((plain_name(name), value) for name, value in values), model, init, seed)


def plain_name(name: str) -> str:
    """Return the name that a parameter had before its module was wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


_WRAPPERS = frozenset(["_orig_mod", "_checkpoint_wrapped_module"])


@torch.no_grad()
def fill(values: Iterable[tuple[str, Tensor]], model: nn.Module, init: Init, seed: int) -> None:
    """Do what `initialize` does for these tensors, of which several may have one name."""
    places = {id(value): place for place, value in _in_order_of_apply(model)}
    wanted: dict[str, list[tuple[str, str, Tensor]]] = {}
    for name, value in values:
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device: give it memory first, module.to_empty(device=...)")
        start = start_value(name)
        if start is not None:
            value.fill_(start)
            continue
        owner, leaf = places[id(_same_in(model, name, value))]
        wanted.setdefault(owner, []).append((leaf, name, value))
    for owner, tensors in wanted.items():
        made = _made(model, owner, tensors[0][2].device, init, seed)
        for leaf, name, value in tensors:
            value.copy_(placed_as(value, _checked(name, value, made[leaf])))


def _in_order_of_apply(module: nn.Module, path: str = "") -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield the parameters and buffers, by module and name in it, as module.apply() comes to them.

    Of a tied parameter the last place is what makes it: apply() would leave what is written there.
    """
    for name, child in module.named_children():
        yield from _in_order_of_apply(child, f"{path}.{name}" if path else name)
    yield from (((path, name), value) for name, value in _own_tensors(module).items())


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module, without those of its submodules."""
    tensors = (*module._parameters.items(), *module._buffers.items())
    return {name: value for name, value in tensors if value is not None}


def _same_in(model: nn.Module, name: str, value: Tensor) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    try:
        there = _own_tensors(model.get_submodule(owner))[leaf]
    except (AttributeError, KeyError):
        raise ValueError(
            f"the model that was given has no parameter or buffer {name}: give the one that was rewritten, and "
            "register as buffers what its forward reads from other attributes"
        ) from None
    if there.shape != value.shape:
        raise ValueError(f"{name} is {list(there.shape)} in the model that was given, and {list(value.shape)} here")
    return there


def _made(model: nn.Module, owner: str, device: torch.device, init: Init, seed: int) -> dict[str, Tensor]:
    """Return what `init` makes of the parameters and buffers of one module, on a device, by their names in it."""
    module = copy.copy(model.get_submodule(owner))
    # nn.Module would take them for parameters of a module
    module.__dict__["_parameters"] = {
        name: value if value is None else nn.Parameter(without_values(value, device), value.requires_grad)
        for name, value in module._parameters.items()
    }
    module.__dict__["_buffers"] = {
        name: value if value is None else without_values(value, device) for name, value in module._buffers.items()
    }
    module.__dict__["_modules"] = {}
    with _drawing_from(f"{seed} {owner}", device):
        init(owner, module)
    return _own_tensors(module)


def _checked(name: str, value: Tensor, made: Tensor) -> Tensor:
    if lacks_values(made):
        raise ValueError(f"init left {name} without values: it is called with a module alone, and sets all of its own")
    if made.shape != value.shape:
        raise ValueError(f"init made {name} {list(made.shape)}, and it is {list(value.shape)}")
    return made


@contextmanager
def _drawing_from(key: str, device: torch.device) -> Generator[None]:
    """Seed torch's generators from a text, and leave them as they were at the end."""
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
        yield


def give_memory(module: nn.Module, device: torch.device) -> None:
    """Give every meta tensor of a module memory on a device, and no values; what is one tensor stays one."""
    twins: dict[int, Tensor] = {}
    for each in module.modules():
        for name, value in each._parameters.items():
            if value is not None and value.is_meta:
                made = nn.Parameter(without_values(value, device), value.requires_grad)
                each._parameters[name] = twins.setdefault(id(value), made)  # type: ignore[assignment]
        for name, value in each._buffers.items():
            if value is not None and value.is_meta:
                each._buffers[name] = twins.setdefault(id(value), without_values(value, device))


@torch.no_grad()
def without_values(like: Tensor, device: torch.device) -> Tensor:
    """Return a tensor like a meta one that `lacks_values`."""
    made = torch.empty_like(like, device=device)
    if made.is_floating_point() or made.is_complex():
        made.fill_(torch.nan)
    else:
        made.fill_(0 if made.dtype is torch.bool else torch.iinfo(made.dtype).min)
        made._attnres_empty = made._version  # type: ignore[attr-defined]
    return made


def lacks_values(value: Tensor) -> bool:
    """Say whether something in a tensor that was made `without_values` has none yet."""
    local = value.to_local() if isinstance(value, DTensor) else value
    if local.is_floating_point() or local.is_complex():
        return bool(local.isnan().any())
    return getattr(value, "_attnres_empty", None) == value._version


def placed_as(value: Tensor, whole: Tensor, *, is_everywhere: bool = True) -> Tensor:
    """Return a whole tensor in the shards of `value`, if that is what fully_shard distributes.

    Every process of the mesh has the whole tensor where `is_everywhere`; else that of the first is sent.
    """
    if not isinstance(value, DTensor) or isinstance(whole, DTensor):
        return whole
    source = None if is_everywhere else 0
    return distribute_tensor(whole.to(value.device), value.device_mesh, value.placements, src_data_rank=source)
