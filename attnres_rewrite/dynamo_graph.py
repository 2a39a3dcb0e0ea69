"""Make a graph that Dynamo traced exportable again.

With dynamic shapes Dynamo hands sizes over as inputs of their own. Export cannot know that they are sizes, so
they are read off the tensors they belong to. Python floats come wrapped in tensors; they become the numbers
they were. The inputs stay, unused, and keep the calling convention.

    forward(s0, ids, eps):  view(x, s0) + eps.item()   ->   forward(s0, ids, eps):  view(x, ids.size(0)) + 1e-5
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from attnres_rewrite.copying import copy_graph
from attnres_rewrite.module import adopt_tree


def without_number_inputs(model: fx.GraphModule, args: Sequence[Any]) -> fx.GraphModule:
    """Return `model`, or a copy in which no input is a size or a wrapped number. `args` are its example inputs."""
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    if not any(isinstance(node.meta.get("example_value"), torch.SymInt) for node in placeholders):
        return model
    graph, _ = copy_graph(model.graph)
    _read_sizes_off_tensors(graph)
    _unwrap_numbers(graph, args)
    copy = fx.GraphModule(torch.nn.Module(), fx.Graph())
    adopt_tree(copy, model)
    copy.training = model.training
    copy.graph = graph
    return copy


def _read_sizes_off_tensors(graph: fx.Graph) -> None:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for size in placeholders:
        symbol = size.meta.get("example_value")
        found = _dimension_of(symbol, placeholders) if isinstance(symbol, torch.SymInt) else None
        if found is None:
            continue
        tensor, dim = found
        with graph.inserting_after(placeholders[-1]):
            measured = graph.call_method("size", (tensor, dim))
        size.replace_all_uses_with(measured, delete_user_cb=lambda user, new=measured: user is not new)


def _unwrap_numbers(graph: fx.Graph, args: Sequence[Any]) -> None:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, args, strict=False):
        if isinstance(value, torch.Tensor) and value.dim() == 0:
            for user in [user for user in node.users if user.op == "call_method" and user.target == "item"]:
                number = value.item()
                for reader in list(user.users):
                    reader.args, reader.kwargs = map_aggregate(
                        (reader.args, dict(reader.kwargs)),
                        lambda arg, old=user, new=number: new if arg is old else arg,
                    )
                graph.erase_node(user)


def _dimension_of(symbol: torch.SymInt, placeholders: list[fx.Node]) -> tuple[fx.Node, int] | None:
    for node in placeholders:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol.node.expr:
                    return node, dim
    return None
