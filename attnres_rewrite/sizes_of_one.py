"""A model that does something else at batch 1 or length 1 -> a condition that is checked at each call.

    if x.shape[1] == 1: ...   traced at 16 tokens   ->   "ids.size()[1] >= 2", (">=", ("size", 0, 1), 2)

torch.export takes every dynamic size for 2 or more and writes no guard for such a choice. So model and graph are both
run at size 1 of each dynamic dimension; where they differ, or the model fails, calls of that size are refused.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from attnres_rewrite.errors import CaptureError, explain
from attnres_rewrite.inputs import InputDims, check_inputs, flat_inputs
from attnres_rewrite.lifted import seeded
from attnres_rewrite.model_state import buffers_kept, in_mode, plain_tensors_kept
from attnres_rewrite.module import ExampleInputs
from attnres_rewrite.records import Captured
from attnres_rewrite.verify import CAPTURE_LIMITS, relative_error

# a dimension of one of the tensors that check_inputs is given
Place = tuple[int, int]


def refuse_other_sizes_of_one(model: nn.Module, captured: Captured, inputs: ExampleInputs) -> Captured:
    """Add a condition to each program for each dynamic size at which 1 is not computed as the model does it.

    Args:
        model: What was captured. It is run, once for each dynamic size and mode, and left as it was.
        captured: Its programs; their first nodes are edited.
        inputs: What it was captured on. Nothing is done where a tensor is on the meta device.

    Raises:
        CaptureError: The example inputs have size 1 there themselves.
    """
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((inputs.args, inputs.kwargs))]
    if any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors):
        return captured
    notes: dict[str, None] = {}
    seen: list[fx.GraphModule] = []
    # its own mode first: not every module can be put into the other
    for mode in sorted(captured.programs, key=lambda mode: mode != captured.training):
        program = captured.programs[mode]
        check = next((node for node in program.graph.nodes if node.target is check_inputs), None)
        if check is None or any(program is other for other in seen):
            continue
        seen.append(program)
        dims: Sequence[InputDims] = check.args[0]
        for places in _dynamic_places(dims):
            with in_mode(model, mode), plain_tensors_kept(model):
                if _same_at_one(model, program, check, places, inputs):
                    continue
            tensor, dim = places[0]
            name = dims[tensor][0]
            if mode == captured.training and _is_one(program, check, places[0], inputs):
                raise _computed_at_two(model, name, dim)
            condition = (f"{name}.size()[{dim}] >= 2", (">=", ("size", tensor, dim), 2))
            check.kwargs = check.kwargs | {"conditions": (*check.kwargs.get("conditions", ()), condition)}
            notes[f"{name} of size 1 in dimension {dim} is refused: the model computes something else there"] = None
    return replace(captured, notes=(*captured.notes, *notes))


def _dynamic_places(dims: Sequence[InputDims]) -> Iterator[list[Place]]:
    """Yield where each symbol stands; not those that are also part of an expression, such as 2*s0."""
    places: dict[str, list[Place]] = {}
    for tensor, (_, sizes) in enumerate(dims):
        for dim, size in enumerate(sizes):
            if isinstance(size, str):
                places.setdefault(size, []).append((tensor, dim))
    in_expressions = {name for size in places if not size.isidentifier() for name in re.findall(r"\w+", size)}
    for symbol, found in places.items():
        if symbol.isidentifier() and symbol not in in_expressions:
            yield found


def _same_at_one(
    model: nn.Module, program: fx.GraphModule, check: fx.Node, places: Sequence[Place], inputs: ExampleInputs
) -> bool:
    """Say whether a call with size 1 at `places` gives what the model gives, or fails as it is."""
    # a tensor that is given twice becomes two: each is narrowed for itself
    args, kwargs = pytree.tree_map(_cloned, (inputs.args, inputs.kwargs))
    leaves = flat_inputs(program.graph, args, kwargs)
    numbers = _placeholder_numbers(program, check)
    for tensor, dim in places:
        leaf = leaves[numbers[tensor]]
        leaf.set_(leaf.narrow(dim, 0, 1).clone())
    everything = (*model.parameters(), *leaves)
    try:
        found = _outputs(model, everything, lambda: fx.Interpreter(program).run(*leaves, enable_io_processing=False))
    # any class: an operation of the graph refuses the size, so no call of it can be wrong
    except Exception:
        return True
    try:
        wanted = _outputs(model, everything, lambda: model(*args, **kwargs))
    # any class: the model refuses the size, and so must the graph
    except Exception:
        return False
    floats = [value.dtype for value in wanted if isinstance(value, Tensor) and value.dtype in CAPTURE_LIMITS]
    return relative_error(wanted, found) <= CAPTURE_LIMITS[floats[0] if floats else torch.float32]


def _placeholder_numbers(program: fx.GraphModule, check: fx.Node) -> list[int]:
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    return [placeholders.index(node) for node in check.args[1:]]


def _outputs(model: nn.Module, tensors: Sequence[Any], run: Callable[[], Any]) -> list[Any]:
    with torch.no_grad(), seeded(tensors, 0), buffers_kept(model):
        return pytree.tree_leaves(run())


def _is_one(program: fx.GraphModule, check: fx.Node, place: Place, inputs: ExampleInputs) -> bool:
    tensor, dim = place
    leaves = flat_inputs(program.graph, inputs.args, inputs.kwargs)
    return leaves[_placeholder_numbers(program, check)[tensor]].shape[dim] == 1


def _computed_at_two(model: nn.Module, name: str, dim: int) -> CaptureError:
    return CaptureError(
        explain(
            f"{type(model).__name__} computes something else at size 1 of {name}, dimension {dim}, than at 2 or more",
            None,
            "It was captured at 2, as torch.export takes a size of 1 for a constant.",
            "Give example inputs of the sizes that it will run at, or fix every shape: dynamic_shapes={}.",
        )
    )


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
