"""What a captured program takes as inputs, checked at each call.

A captured graph has sizes baked in, arguments that are no tensors, and choices that the model's code made by them.
Called with another shape or flag it could fail deep inside, or compute something else, so its first node is
check_inputs: plain Python on shapes, which torch.compile turns into guards.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from attnres_rewrite.fxgraph import tensor_of
from attnres_rewrite.trace_conditions import Condition, holds

# name, and for each dimension a size or a symbol; equal symbols are equal sizes
InputDims = tuple[str, tuple[int | str, ...]]


@fx.wrap
def check_inputs(
    expected: tuple[InputDims, ...],
    *tensors: torch.Tensor,
    constants: tuple[tuple[str, Any], ...] = (),
    given: tuple[Any, ...] = (),
    conditions: tuple[Condition, ...] = (),
) -> None:
    """Raise ValueError when a call is not one the program was captured for.

    Args:
        expected: The name and the dimensions of each tensor.
        tensors: The tensors given.
        constants: The name and the value of each argument that is no tensor.
        given: The values given for these.
        conditions: What the sizes of `tensors` must fulfil beyond their dimensions.
    """
    for (name, value), found in zip(constants, given, strict=True):
        # NaN is a constant, too
        if isinstance(found, torch.Tensor) or (found != value and (found == found or value == value)):
            shown = f"a tensor {list(found.shape)}" if isinstance(found, torch.Tensor) else repr(found)
            raise ValueError(
                f"{name} is {shown}; the program was captured for {name}={value!r}, and computes nothing else. "
                "Rewrite again with example inputs that have it"
            )
    seen: dict[str, int] = {}
    for (name, dims), tensor in zip(expected, tensors, strict=True):
        # callers are not all type-checked
        if not isinstance(tensor, torch.Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"{name} is {tensor!r}; the program was captured for a tensor")
        if tensor.dim() != len(dims):
            raise ValueError(f"{name} has {tensor.dim()} dimensions; the program was captured for {len(dims)}")
        for dim, (want, size) in enumerate(zip(dims, tensor.shape, strict=True)):
            if isinstance(want, str):
                # only plain symbols bind; "2*s0" and the like are left to the graph itself
                if want.isidentifier() and seen.setdefault(want, size) != size:
                    raise ValueError(
                        f"{name} has size {size} in dimension {dim}; another input has {seen[want]} there, "
                        "and the program was captured with both equal"
                    )
            elif size != want:
                raise ValueError(
                    f"{name} has size {size} in dimension {dim}; the program was captured for {want} only. "
                    "Rewrite again with example inputs of this size, or with dynamic_shapes"
                )
    for text, tree in conditions:
        if not holds(tree, tensors):
            raise ValueError(
                f"the program was captured where {text}, and this call has sizes "
                f"{[list(tensor.shape) for tensor in tensors]}: the model may do something else there. "
                "Rewrite again with example inputs of these sizes"
            )


has_side_effect(check_inputs)


def check_inputs_given(args: object, kwargs: object) -> None:
    """Raise TypeError for example inputs that are not as a call takes them; callers are not all type-checked."""
    if not isinstance(args, list | tuple):
        raise TypeError(f"args is a {type(args).__name__}; give a tuple of the positional inputs: args=(ids,)")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"kwargs is a {type(kwargs).__name__}; give a dict of the inputs by name, and a config as config=..."
        )


def plain_inputs(inputs: Any) -> Any:
    """Return nested inputs with the symbolic numbers that Dynamo hands out made plain."""
    plain = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
    return pytree.tree_map(lambda leaf: plain[type(leaf)](leaf) if type(leaf) in plain else leaf, inputs)


def flat_inputs(graph: fx.Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Bind a call to the arguments of a captured graph and flatten it to its placeholders.

    Raises:
        TypeError: An argument is missing, unknown, or given twice; or its nesting is another one.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    info = getattr(graph._codegen, "pytree_info", None)
    names = [node.target for node in placeholders] if info is None else [n for n in info.orig_args if n != "self"]
    bound = dict(zip(names, args, strict=False))
    if len(args) > len(names) or bound.keys() & kwargs.keys() or kwargs.keys() - set(names):
        raise TypeError(f"the captured program takes {', '.join(names)}; got {len(args)} positional and {list(kwargs)}")
    bound |= kwargs
    constants = {node.target: node.meta.get("val") for node in placeholders if tensor_of(node) is None}
    missing = [name for name in names if name not in bound and name not in constants]
    if missing:
        raise TypeError(f"the captured program also takes {', '.join(missing)}")
    values = {name: bound.get(name, constants.get(name)) for name in names}
    if info is None:
        return list(values.values())
    positional, named = info.in_spec.children()
    count = positional.num_children
    call = (
        tuple(values[name] for name in names[:count]),
        {name: values[name] for name in named.context} if named.num_children else {},
    )
    leaves, spec = pytree.tree_flatten(call)
    if len(leaves) != len(placeholders):
        raise TypeError(f"the inputs are nested as {spec}; the program was captured with {info.in_spec}")
    return leaves
