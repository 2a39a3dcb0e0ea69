"""A captured graph names the devices of what it makes itself, such as masks and positions: the same for another device.

    arange(16, device=cpu)   ->   arange(16, device=cuda)

Parameters and buffers are moved by torch; this moves the rest.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx.node import map_aggregate

from attnres_rewrite.copying import copy_graph
from attnres_rewrite.errors import CaptureError, explain

_TO_DEVICE = torch.ops.aten.to.device
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


@contextmanager
def ties_kept(module: nn.Module) -> Generator[None]:
    """Have tied parameters tied after a move: between some devices torch makes a new one in each place."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((owner._parameters, name))
    yield
    for (first, its_name), *others in places.values():
        for table, name in others:
            table[name] = first[its_name]


def exported_on(program: ExportedProgram, device: torch.device) -> fx.GraphModule:
    """Return the module of an exported program, with its parameters, moved; torch's own pass unties what is tied."""
    gm = program.module()
    assert isinstance(gm, fx.GraphModule)
    with ties_kept(gm):
        gm.to(device)
    move_graph(gm.graph, device)
    move_attributes(gm, [gm.graph], device)
    gm.recompile()
    return gm


def read_device_names(gm: fx.GraphModule) -> None:
    """Replace the names of devices by devices, in place: torch's move_to_device_pass writes names."""
    for graph in [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]:
        for node in graph.nodes:
            if isinstance(name := node.kwargs.get("device"), str):
                node.kwargs = node.kwargs | {"device": torch.device(name)}
            if node.target is _TO_DEVICE and isinstance(node.args[1], str):
                node.update_arg(1, torch.device(node.args[1]))
