"""Write a captured graph as JSON and read it back, without pickle.

A node is its op, its target by name, and its arguments. Names resolve to registered torch ops, to arithmetic
of the operator module and to the few functions of this package that graphs call; nothing else can be named, and what
torch.fx writes into the source of a graph as it stands must be a name, so a file can make no other code run.
"""

import json
import keyword
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from attnres_rewrite.errors import ArtifactError
from attnres_rewrite.fxgraph import module_path, source_line
from attnres_rewrite.inputs import check_inputs
from attnres_rewrite.kernels.inter_block.op import inter_block
from attnres_rewrite.kernels.merge.op import add_merge_norm, merge, with_recency_bias
from attnres_rewrite.kernels.read.op import block_attn_res
from attnres_rewrite.kernels.variant_read.op import variant_attn_res
from attnres_rewrite.passes.relax_checks import check_captured

Json = Any

_OWN: dict[str, Callable[..., Any]] = {
    "block_attn_res": block_attn_res,
    "variant_attn_res": variant_attn_res,
    "with_recency_bias": with_recency_bias,
    "inter_block": inter_block,
    "merge": merge,
    "add_merge_norm": add_merge_norm,
    "check_inputs": check_inputs,
    "check_captured": check_captured,
}
_ARITHMETIC = frozenset(
    """getitem add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor not_ lshift
    rshift""".split()
)
_FUNCTIONS: dict[str, Callable[..., Any]] = (
    {f"operator.{name}": getattr(operator, name) for name in _ARITHMETIC}
    | {f"torch.{name}": getattr(torch, name) for name in dir(torch) if name.startswith("sym_")}
    | {f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")}
    | {"round": round, "min": min, "max": max}
)
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def graph_to_json(graph: fx.Graph) -> Json:
    """Return the nodes and the calling convention of a graph.

    Raises:
        ArtifactError: A target or an argument has no name that could be read back.
    """
    return {"nodes": [_node_to_json(node) for node in graph.nodes], "call": _call_to_json(graph)}


def graph_from_json(data: Json) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """Return the graph of `data`, and its nodes by name.

    Raises:
        ArtifactError: A target is not known here, e.g. an op of a library that is not imported.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        args, kwargs = _value_from_json(entry["args"], nodes), _value_from_json(entry["kwargs"], nodes)
        for keyword_name in kwargs:
            _check_name(keyword_name)
        target = _target_from_json(entry["op"], entry["target"])
        node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
        node.meta = _meta_from_json(entry["meta"])
        nodes[entry["name"]] = node
    if data["call"] is not None:
        graph.set_codegen(_PyTreeCodeGen(_call_from_json(data["call"])))
    return graph, nodes


def _node_to_json(node: fx.Node) -> Json:
    return {
        "name": node.name,
        "op": node.op,
        "target": _target_to_json(node),
        "args": _value_to_json(tuple(node.args), node),
        "kwargs": _value_to_json(dict(node.kwargs), node),
        "meta": _meta_to_json(node),
    }


def _target_to_json(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    for name, function in _OWN.items():
        if target is function:
            return f"attnres_rewrite.{name}"
    if target in _NAMES:
        return _NAMES[target]
    raise ArtifactError(f"cannot be saved: node {node.name} calls {target}, which has no name to load it by")


def _target_from_json(op: str, name: str) -> Any:
    if op not in ("placeholder", "get_attr", "call_function", "output"):
        raise ArtifactError(f"the program holds a node of the kind {op!r}, which no capture makes")
    if op == "placeholder":
        _check_name(name)
    if op == "get_attr" and not _is_printed_safely(name):
        raise ArtifactError(f"the program names a parameter {name!r}, which is no path of attributes")
    if op != "call_function":
        return name
    prefix, _, rest = name.partition("attnres_rewrite.")
    if not prefix and rest in _OWN:
        return _OWN[rest]
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if not name.startswith("torch.ops."):
        raise ArtifactError(f"the program calls {name!r}, which is no torch op")
    found: Any = torch.ops
    for part in name.split(".")[2:]:
        found = getattr(found, part, None)
        if found is None:
            raise ArtifactError(f"the program calls {name!r}, which is not registered; import the library it is from")
    if not isinstance(found, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        raise ArtifactError(f"the program calls {name!r}, which is no torch op")
    return found


def _check_name(name: object) -> None:
    """Raise ArtifactError unless a name is one of Python's, with the stars of *args and **kwargs at most."""
    plain = name.removeprefix("*").removeprefix("*") if isinstance(name, str) else ""
    if not plain.isidentifier() or keyword.iskeyword(plain):
        raise ArtifactError(f"the program calls an argument {name!r}, which is no name")


def _is_printed_safely(text: object) -> bool:
    """Say whether a text between quotes in a source is that text."""
    return isinstance(text, str) and text.isprintable() and not set(text) & set("'\"\\")


def _value_to_json(value: Any, node: fx.Node) -> Json:
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [_value_to_json(item, node) for item in value]}
    if isinstance(value, list):
        return [_value_to_json(item, node) for item in value]
    if isinstance(value, dict):
        return {"dict": [[key, _value_to_json(item, node)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_value_to_json(part, node) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in _CONSTANTS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise ArtifactError(f"cannot be saved: node {node.name} has a {type(value).__name__} argument, {value!r}")


def _value_from_json(data: Json, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(data, list):
        return [_value_from_json(item, nodes) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "node":
        return nodes[value]
    if kind == "float":
        return float(value)
    if kind == "tuple":
        return tuple(_value_from_json(item, nodes) for item in value)
    if kind == "dict":
        return {key: _value_from_json(item, nodes) for key, item in value}
    if kind == "slice":
        return slice(*(_value_from_json(part, nodes) for part in value))
    if kind == "device":
        return torch.device(value)
    constant = getattr(torch, value, None)
    if kind not in _CONSTANTS or not isinstance(constant, _CONSTANTS[kind]):
        raise ArtifactError(f"the program holds a {kind} {value!r}, which torch does not know")
    return constant


def _meta_to_json(node: fx.Node) -> Json:
    """Keep what reports and proofs read: where a node came from, and the constants of the signature."""
    meta: dict[str, Json] = {"source": source_line(node), "modules": list(module_path(node))}
    if node.op == "placeholder" and not isinstance(node.meta.get("val"), torch.Tensor):
        meta["val"] = _value_to_json(node.meta.get("val"), node)
    if "attn_res" in node.meta:
        meta["attn_res"] = node.meta["attn_res"]
    return meta


def _meta_from_json(data: Json) -> dict[str, Any]:
    meta: dict[str, Any] = {"nn_module_stack": {fqn: (fqn, "") for fqn in data["modules"]}}
    if data["source"]:
        file, _, line = data["source"].rpartition(":")
        meta["stack_trace"] = f'File "{file}", line {line}'
    if "val" in data:
        meta["val"] = _value_from_json(data["val"], {})
    if "attn_res" in data:
        meta["attn_res"] = data["attn_res"]
    return meta


def _call_to_json(graph: fx.Graph) -> Json:
    info = getattr(graph._codegen, "pytree_info", None)
    if info is None:
        return None
    try:
        in_spec, out_spec = (None if spec is None else pytree.treespec_dumps(spec) for spec in info[1:])
    except NotImplementedError as why:
        raise ArtifactError(
            f"cannot be saved: {why}\n  Register the output class with a serialized_type_name "
            "(torch.export.register_dataclass)."
        ) from why
    return {"arguments": list(info.orig_args), "in_spec": in_spec, "out_spec": out_spec}


def _call_from_json(data: Json) -> _PyTreeInfo:
    for name in data["arguments"]:
        _check_name(name)
    specs: list[Any] = []
    for name in ("in_spec", "out_spec"):
        try:
            if data[name] is not None:
                _check_spec(json.loads(data[name])[1])
            specs.append(None if data[name] is None else pytree.treespec_loads(data[name]))
        except (NotImplementedError, ValueError, KeyError) as why:
            raise ArtifactError(
                f"the {name} of the program cannot be read: {why}\n"
                "  Import the library that defines the model's output class first, e.g. transformers."
            ) from why
    return _PyTreeInfo(data["arguments"], *specs)


def _check_spec(spec: Json) -> None:
    """Raise ArtifactError where a pytree would import a module that it names, or a key would end a quoted text.

    torch.fx writes the keys of keyword arguments into a source.
    """
    if spec["type"] is None:
        return
    context = json.loads(spec["context"]) if isinstance(spec["context"], str) else spec["context"]
    if _imports(context):
        raise ArtifactError(
            "the program has a defaultdict or an enum among its inputs or outputs, which names a module"
        )
    if spec["type"] == "builtins.dict" and not all(map(_is_printed_safely, _texts(context))):
        raise ArtifactError(f"the program has an input or output called {context!r}, which holds quotes")
    for child in spec["children_spec"]:
        _check_spec(child)


def _imports(context: Json) -> bool:
    if isinstance(context, dict):
        return bool(context.keys() & {"default_factory_module", "__enum__"}) or any(map(_imports, context.values()))
    return isinstance(context, list) and any(map(_imports, context))


def _texts(context: Json) -> list[str]:
    return [key for key in context if isinstance(key, str)] if isinstance(context, list) else []
