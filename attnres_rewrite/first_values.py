"""initialize(): values for a model that was built on the meta device, of which this process holds a part.

    with torch.device("meta"): model = Network(config)   ->  rewrite  ->  unflatten, fully_shard  ->  initialize
                                                                      ->  partition, build_pipeline

The model's own code initialises the model, in which what this process holds stands in for a while; on all else, which
stays on meta, that code does nothing. Of parameters that are sharded a few are whole at a time. Random numbers follow
from a seed, the name of what they are drawn into and how often that was drawn into: a parameter starts alike wherever
the model is cut, and in all its copies.

What has memory and no values yet is full of NaN, or of the least integer: so what was left out is found.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnres_rewrite.read_parameters import start_value

Init = Callable[[Any], object]
# of sharded parameters that are whole at a time; a larger one is alone
_WHOLE_BYTES = 4 << 30


def initialize(part: nn.Module, model: nn.Module, init: Init, *, seed: int = 0) -> None:
    """Give the parameters and buffers of a rewritten model their first values, those of its reads included.

    Args:
        part: What `rewrite` or `unflatten` returned, with memory: part.to_empty(device=...). Its modules may be wrapped
            in activation checkpoints, compiled, and sharded by fully_shard. `Pipeline.initialize` does the same for
            the stages of a rank.
        model: The model that was rewritten, on the meta device, where it stays.
        init: Called as init(model) under torch.no_grad, once or several times; it initialises the whole model, every
            parameter and buffer, as on any device: `lambda model: model.initialize_weights()` for one of transformers,
            `lambda model: model.apply(function)`.
        seed: Of the random numbers that `init` draws from torch.

    Raises:
        ValueError: `part` has something that `model` lacks or has in another shape, is on the meta device, or `init`
            left a parameter or a buffer as it was.
        TypeError: `part` or `model` is no module, or `init` cannot be called.
    """
    _refuse_what_is_no_module(part)
    values = [*part.named_parameters(remove_duplicate=False), *part.named_buffers(remove_duplicate=False)]
    fill(((plain_name(name), value) for name, value in values), model, init, seed)


def plain_name(name: str) -> str:
    """Return the name that a parameter had before its module was wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


_WRAPPERS = frozenset(["_orig_mod", "_checkpoint_wrapped_module"])


@dataclass(slots=True)
class _Wanted:
    """A tensor of the model, and the copies of it that this process holds; `stand_in` has memory for all of it."""

    name: str
    copies: list[Tensor] = field(default_factory=list[Tensor])
    stand_in: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of memory that a whole tensor takes beside its copies."""
        return self.copies[0].nbytes if isinstance(self.copies[0], DTensor) else 0


@torch.no_grad()
def fill(values: Iterable[tuple[str, Tensor]], model: nn.Module, init: Init, seed: int) -> None:
    """Do what `initialize` does for these tensors, of which several may have one name."""
    _refuse_what_is_no_module(model)
    if not callable(init):
        raise TypeError(f"init is called as init(model); got {type(init).__name__}")
    wanted: dict[int, _Wanted] = {}
    of_reads: list[tuple[Tensor, float]] = []
    for name, value in values:
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device: give it memory first, module.to_empty(device=...)")
        if (start := start_value(name)) is not None:
            of_reads.append((value, start))
        else:
            wanted.setdefault(id(_same_in(model, name, value)), _Wanted(name)).copies.append(value)
    for value, start in of_reads:
        value.fill_(start)
    devices = {value.device for each in wanted.values() for value in each.copies}
    for group in _groups(wanted):
        for each in group.values():
            each.stand_in = without_values(_whole(each.copies[0]))
        draws = _keeping_generators(devices)
        with _standing_in(model, group) as made, draws, _KeyedDraws(seed, _names_of_memory(model)):
            init(model)
        for key, each in group.items():
            _take(each, made[key])


def _refuse_what_is_no_module(value: object) -> None:
    if not isinstance(value, nn.Module):
        hint = ": a pipeline has a method of that name" if hasattr(value, "stages") else ""
        raise TypeError(f"initialize(part, model, init) takes modules; got {type(value).__name__}{hint}")


def _whole(value: Tensor) -> Tensor:
    """Return a tensor itself, or memory for all of it where this process has a shard."""
    return torch.empty(value.shape, dtype=value.dtype, device=value.device) if isinstance(value, DTensor) else value


def _same_in(model: nn.Module, name: str, value: Tensor) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
        there = {**module._parameters, **module._buffers}[leaf]
    except (AttributeError, KeyError):
        there = None
    if there is None:
        raise ValueError(
            f"the model that was given has no parameter or buffer {name}: give the one that was rewritten. A constant "
            "of its forward has no numbers on meta: make it as torch.tensor(number).to(x.device), or register a buffer"
        )
    if there.shape != value.shape:
        raise ValueError(f"{name} is {list(there.shape)} in the model that was given, and {list(value.shape)} here")
    return there


def _groups(wanted: Mapping[int, _Wanted]) -> Iterator[dict[int, _Wanted]]:
    """Divide what is wanted into groups whose whole tensors take no more than _WHOLE_BYTES."""
    group: dict[int, _Wanted] = {}
    taken = 0
    for key, each in wanted.items():
        if group and taken + each.num_bytes > _WHOLE_BYTES:
            yield group
            group, taken = {}, 0
        group[key] = each
        taken += each.num_bytes
    yield group


@contextmanager
def _standing_in(model: nn.Module, group: Mapping[int, _Wanted]) -> Generator[dict[int, Tensor]]:
    """Put the stand-ins into the model in the place of its meta tensors; afterwards fill the dict with what is there.

    The tensors of the model are put back at the end, whatever `init` has put into their places.
    """
    places: list[tuple[dict[str, Any], str, Any]] = []
    marked: list[nn.Module] = []
    for module in model.modules():
        if module.__dict__.pop("_is_hf_initialized", None) is not None:
            marked.append(module)  # transformers would leave it out
        for table in (module._parameters, module._buffers):
            places += [(table, name, value) for name, value in table.items() if value is not None]
    made: dict[int, Tensor] = {}
    try:
        for table, name, value in places:
            if id(value) in group:
                stand_in = group[id(value)].stand_in
                assert stand_in is not None
                table[name] = _as_in(value, stand_in)
        yield made
        for table, name, value in places:
            found = table.get(name)
            if id(value) in group and found is not None and (id(value) not in made or _is_new(found, group[id(value)])):
                made[id(value)] = found
    finally:
        for table, name, value in places:
            table[name] = value
        for module in model.modules():
            module.__dict__.pop("_is_hf_initialized", None)
        for module in marked:
            module.__dict__["_is_hf_initialized"] = True


def _is_new(value: Tensor, each: _Wanted) -> bool:
    assert each.stand_in is not None
    return _memory_of(value) != _memory_of(each.stand_in)


def _as_in(place: Tensor, stand_in: Tensor) -> Tensor:
    is_alike = isinstance(place, nn.Parameter) == isinstance(stand_in, nn.Parameter)
    return stand_in if is_alike else nn.Parameter(stand_in, requires_grad=place.requires_grad)


def _take(each: _Wanted, made: Tensor) -> None:
    """Copy what `init` made into the copies, and let go of what was whole for it."""
    if lacks_values(made):
        raise ValueError(f"init left {each.name} without values: it sets every number of the model")
    if made.shape != each.copies[0].shape:
        raise ValueError(f"init made {each.name} {list(made.shape)}, and it is {list(each.copies[0].shape)}")
    for value in each.copies:
        value.copy_(placed_as(value, made))
    each.stand_in = None


class _KeyedDraws(TorchDispatchMode):
    """Seeds torch before each draw, by what it is drawn into: `names` are those of the model's tensors by memory."""

    def __init__(self, seed: int, names: Mapping[int, str]) -> None:
        super().__init__()
        self.seed, self.names = seed, names
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        options = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and options.get("generator") is None:
            first = args[0] if args else None
            name = self.names.get(_memory_of(first), "") if isinstance(first, Tensor) else ""
            self.counts[name] += 1
            key = hashlib.sha256(f"{self.seed} {name} {self.counts[name]}".encode()).digest()
            torch.manual_seed(int.from_bytes(key[:8], "little"))
        return func(*args, **options)


def _memory_of(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _names_of_memory(model: nn.Module) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(_memory_of(value), name)
    return names


@contextmanager
def _keeping_generators(devices: Iterable[torch.device]) -> Generator[None]:
    """Leave torch's generators as they were."""
    others = {device for device in devices if device.type != "cpu"}
    kind = next((device.type for device in others), "cuda")
    with torch.random.fork_rng(list(others), device_type=kind):
        yield


def give_memory(module: nn.Module, device: torch.device) -> None:
    """Give every meta tensor of a module memory on a device, and no values; what is one tensor stays one."""
    twins: dict[int, Tensor] = {}
    for each in module.modules():
        for name, value in each._parameters.items():
            if value is not None and value.is_meta:
                made = nn.Parameter(without_values(torch.empty_like(value, device=device)), value.requires_grad)
                each._parameters[name] = twins.setdefault(id(value), made)  # type: ignore[assignment]
        for name, value in each._buffers.items():
            if value is not None and value.is_meta:
                made = without_values(torch.empty_like(value, device=device))
                each._buffers[name] = twins.setdefault(id(value), made)


@torch.no_grad()
def without_values(value: Tensor) -> Tensor:
    """Fill a tensor with what `lacks_values` finds, and return it."""
    if value.is_floating_point() or value.is_complex():
        return value.fill_(torch.nan)
    value.fill_(0 if value.dtype is torch.bool else torch.iinfo(value.dtype).min)
    value._attnres_empty = value._version  # type: ignore[attr-defined]
    return value


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
