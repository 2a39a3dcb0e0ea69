"""What the nodes of a graph read, without gradients: of the network itself, or of an un-rewritten twin."""

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from attnres_rewrite.errors import CheckpointError, explain
from attnres_rewrite.module import Program, RewrittenModule, attribute

Values = dict[str, Any]  # by the target of get_attr

_LISTED = 8


def own_values(new: RewrittenModule, *graphs: fx.Graph) -> Values:
    """Return what graphs of `new` read: parameters that need no gradient, copies of buffers that may be written."""
    values: Values = {}
    copies: dict[int, Tensor] = {}
    for node in itertools.chain(*(graph.nodes for graph in graphs)):
        name = str(node.target)
        if node.op in ("get_attr", "call_module") and name not in values:
            values[name] = _without_gradient(attribute(new, name), copies)
    return values


def _without_gradient(value: Any, copies: dict[int, Tensor]) -> Any:
    if isinstance(value, nn.Parameter):
        return value.detach()
    if isinstance(value, Tensor):
        return copies.setdefault(id(value), value.detach().clone())
    return value


def twin_values(new: RewrittenModule, program: Program, twin: nn.Module | Mapping[str, Tensor]) -> Values:
    """Return what the original graph reads, with the values of a network that was not rewritten.

    Names that are tied in `new` may be given once. Constants and buffers that are not saved come from `new`.

    Raises:
        CheckpointError: A name is missing or unknown, or a shape is another.
        TypeError: `twin` is neither a module nor a mapping of tensors.
    """
    if isinstance(twin, nn.Module):
        twin = twin.state_dict()
    # callers are not all type-checked
    if not isinstance(twin, Mapping) or not all(isinstance(value, Tensor) for value in twin.values()):  # pyright: ignore[reportUnnecessaryIsInstance]
        seen = type(twin).__name__
        if isinstance(twin, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            name, value = next((name, value) for name, value in twin.items() if not isinstance(value, Tensor))
            seen += f" whose {name!r} is a {type(value).__name__}, not a tensor"
        raise TypeError(f"baseline is a state dict, a module, None or False; got {seen}")
    given = _with_tied(new, program, twin)
    values = own_values(new, program.original)
    return {name: _like(value, given[name]) if name in given else value for name, value in values.items()}


def _like(own: Tensor, given: Tensor) -> Tensor:
    """Convert a value as load_state_dict does; a buffer may be written, so it is copied."""
    return given.detach().to(own.device, own.dtype, copy=True)


def _with_tied(new: RewrittenModule, program: Program, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    added = {
        f"{read.name}.{leaf}"
        for plan in program.plans
        for read in plan.reads
        for leaf in new.config.parameter_sizes(plan.stream.width)
    }
    wanted = {name: value for name, value in new.state_dict(keep_vars=True).items() if name not in added}
    by_tensor = {id(value): given[name] for name, value in wanted.items() if name in given}
    complete = {name: given.get(name, by_tensor.get(id(value))) for name, value in wanted.items()}
    missing = [name for name, value in complete.items() if value is None]
    unknown = [name for name in given if name not in wanted]
    found = {name: value for name, value in complete.items() if value is not None}
    shapes = [
        f"{name} {list(value.shape)}, not {list(wanted[name].shape)}"
        for name, value in found.items()
        if value.shape != wanted[name].shape
    ]
    if missing or unknown or shapes:
        seen = [_list("missing", missing), _list("unknown", unknown), _list("of another shape", shapes)]
        remedy = "Give the state dict of the same model, trained without the rewrite."
        if any(name in added for name in unknown):
            remedy = "It is a rewrite itself, or of an attached model. " + remedy
        raise CheckpointError(explain("the baseline is another model", None, "; ".join(filter(None, seen)), remedy))
    return found


def _list(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{what}: {', '.join(names[:_LISTED])}{more}" if names else ""
