"""A captured graph names the devices of what it makes itself, such as masks and positions: the same for another device.

    arange(16, device=cpu)   ->   arange(16, device=cuda)

Parameters and buffers are moved by torch; this moves the rest.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_aggregate

from attnres_rewrite.copying import copy_graph
from attnres_rewrite.errors import CaptureError, explain

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def move_graph(graph: fx.Graph, device: torch.device) -> None:
    """Have a graph make what it makes on `device`, in place; the values that its nodes recorded move as well."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = map_aggregate(
                (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
            )
        if node.target is _AUTOCAST and device.type != "meta":  # for which there is no autocast
            node.args = (device.type, *node.args[1:])
        if "val" in node.meta:
            node.meta["val"] = map_aggregate(node.meta["val"], lambda value: _recorded_on(value, device))


def _recorded_on(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, FakeTensor):
        with value.fake_mode:
            return torch.empty_like(value, device=device)
    return torch.empty((), dtype=value.dtype, device=device).expand(value.shape)


def move_attributes(root: nn.Module, graphs: Iterable[fx.Graph], device: torch.device) -> None:
    """Move what graphs of `root` read that torch does not: constants, and the bodies of calls, in place.

    A body is replaced by a copy: other modules have the same one.

    Raises:
        CaptureError: A constant was made on meta, and has no numbers to take elsewhere.
    """
    for target in {str(node.target) for graph in graphs for node in graph.find_nodes(op="get_attr")}:
        path, _, name = target.rpartition(".")
        owner = root.get_submodule(path)
        value = getattr(owner, name)
        if isinstance(value, fx.GraphModule):
            graph, _ = copy_graph(value.graph)
            move_graph(graph, device)
            moved = fx.GraphModule(value, graph, class_name=value._get_name())
            move_attributes(moved, [moved.graph], device)
            setattr(owner, name, moved)
        elif name in vars(owner):
            value = getattr(value, "_attnres_numbers", value)
            if value.is_meta and device.type != "meta":
                raise CaptureError(
                    explain(
                        f"{target}, which the forward makes, is on the meta device: its numbers are lost",
                        None,
                        "torch.tensor(number, device=x.device) makes such a constant.",
                        "Make it on the CPU, torch.tensor(number).to(x.device), or register it as a buffer.",
                    )
                )
            moved = value.to(device)
            if moved.is_meta and not value.is_meta:
                moved._attnres_numbers = value  # for the way back: no state dict has a constant
            setattr(owner, name, moved)
