"""Plain facts about the nodes of a graph in ATen training IR: op, value, place, aliasing."""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

# The last frame of a stack trace is the line that ran; torch's own frames are not in it.
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_SUBSCRIPT = re.compile(r"\['?([^'\]]+)'?\]")
_GETATTR = re.compile(r"getattr\(([^()]*), '([^']*)'\)")
_REPEATED_CALL = re.compile(r"@\d+")


def op_name(node: fx.Node) -> str:
    """Name the op without its overload: "add", "add_", "getitem"; other namespaces keep theirs."""
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = node.target._schema.name.partition("::")
        return name if namespace == "aten" else f"{namespace}::{name}"
    return getattr(node.target, "__name__", str(node.target))


def tensor_of(node: object) -> torch.Tensor | None:
    """Return the fake tensor that the capture recorded for `node`, if its value is one tensor."""
    if not isinstance(node, fx.Node):
        return None
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: object) -> tuple[Any, ...] | None:
    """Return the shape of `node` at the example inputs.

    A dynamic size counts as the one it had there: two expressions for one size (s // 2 and 2 * (s // 4)) are not
    provably equal, and asking torch whether they are would add guards.
    """
    value = tensor_of(node)
    return None if value is None else tuple(_example_size(size) for size in value.shape)


def _example_size(size: int | torch.SymInt) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    return size.node.expr if size.node.hint is None else int(size.node.hint)


def num_bytes_of(node: object) -> int:
    """Return the bytes of one tensor at the example inputs; 0 for what is none."""
    value = tensor_of(node)
    return 0 if value is None else math.prod(shape_of(node) or ()) * value.element_size()


def symbolic_shape_of(node: object) -> tuple[int | str, ...] | None:
    """Return the shape of `node`, a dynamic size as its expression, e.g. "s0"."""
    value = tensor_of(node)
    return None if value is None else tuple(_symbolic_size(size) for size in value.shape)


def _symbolic_size(size: int | torch.SymInt) -> int | str:
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else str(expression)


_SHAPE_ONLY = frozenset(
    """sym_size sym_stride sym_numel sym_storage_offset _assert_tensor_metadata zeros_like ones_like empty_like
    full_like rand_like randn_like new_zeros new_ones new_empty new_full""".split()
)


def reads_shape_only(node: fx.Node) -> bool:
    """Say whether a node looks at the shape and dtype of its input, and never at its values."""
    return op_name(node) in _SHAPE_ONLY


_LIKE_ANOTHER = frozenset("type_as expand_as view_as reshape_as".split())


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a node but for y of x.type_as(y), x.expand_as(y) and the like: y only lends its form."""
    inputs = node.all_input_nodes
    return inputs[:1] if op_name(node) in _LIKE_ANOTHER else inputs


def is_floating(node: object) -> bool:
    """Say whether `node` is one floating-point tensor."""
    value = tensor_of(node)
    return value is not None and value.dtype.is_floating_point


def can_learn(value: torch.Tensor) -> bool:
    """Say whether a tensor of this dtype can have a gradient."""
    return value.is_floating_point() or value.is_complex()


def has_one_element(node: object) -> bool:
    """Say whether `node` is a tensor of exactly one element, whatever its rank."""
    shape = shape_of(node)
    return shape is not None and all(size == 1 for size in shape)


def argument(node: fx.Node, position: int, name: str, default: object = None) -> Any:
    """Return an argument of a call given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def source_line(node: fx.Node) -> str:
    """Return "file.py:12", the line of the model's code that made the node, or ""."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return ":".join(frames[-1]) if frames else ""


def module_path(node: fx.Node) -> tuple[str, ...]:
    """Return the FQNs of the modules around the node, outermost (the model, "") first."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(plain_path(entry[0]) for entry in stack.values())


def plain_path(name: str) -> str:
    """Clean a name of a module or parameter: export marks repeated calls "l@1", Dynamo writes expressions for "h.norm".

    getattr(L['self'].h, '0').norm,  L['self']._modules['h'][0].norm,  L['self'].h.__dict__['_modules']['0'].norm
    """
    name = _REPEATED_CALL.sub("", name)
    while (plain := _GETATTR.sub(r"\1.\2", name)) != name:
        name = plain
    if name.startswith(("L[", "G[")):
        inner = name.partition("]")[2].replace(".__dict__['_modules']", "")
        inner = inner.replace("._modules[", "[").replace("._parameters[", "[")
        name = _SUBSCRIPT.sub(r".\1", inner).lstrip(".")
    return name


def owner_of(node: fx.Node) -> str:
    """Return the FQN of the innermost module whose code made the node."""
    path = module_path(node)
    return path[-1] if path else ""


def module_classes(node: fx.Node) -> tuple[str, ...]:
    """Return the qualified class names of the modules around the node, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(_class_name(entry[1]) for entry in stack.values())


def _class_name(entry: object) -> str:
    return entry if isinstance(entry, str) else getattr(entry, "__qualname__", str(entry))


def place_of(node: fx.Node) -> str:
    """Name a node for an error message: its source line when known, else its name and module."""
    return source_line(node) or f"node {node.name} in {owner_of(node) or 'the model'}"


def place_meta(node: fx.Node) -> dict[str, Any]:
    """Return the metadata that says where a node stands: its line, its modules, the activation checkpoint around it."""
    return {key: node.meta[key] for key in _PLACE_META if key in node.meta}


_PLACE_META = ("nn_module_stack", "stack_trace", "recompute", "ac_graph_id")


def written_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the inputs that the op writes into."""
    unsaid = _STATISTICS if op_name(node) == "batch_norm" and argument(node, 5, "training") else ()
    return [arg for arg, schema in _arguments_with_schema(node) if _writes(schema) or schema.name in unsaid]


# a batch norm that trains moves them along, which its schema does not say
_STATISTICS = ("running_mean", "running_var")


def aliased_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the inputs whose memory an output of the op may share (views, in-place results)."""
    if node.op != "call_function":
        return []
    if not isinstance(node.target, torch._ops.OpOverload):
        # getitem of a list of views, and what we know nothing about
        return [node.args[0]] if op_name(node) == "getitem" and isinstance(node.args[0], fx.Node) else []
    if op_name(node) in ("to", "type_as") and not _same_dtype(node, node.args[0]):
        return []
    # an annotated argument is viewed or written; either way a result shares its memory
    found = [arg for arg, schema in _arguments_with_schema(node) if schema.alias_info is not None]
    # these return their input when nothing has to change, and some do not say so in their schema
    if op_name(node) in _MAY_RETURN_INPUT and node.all_input_nodes and not found:
        found.append(node.all_input_nodes[0])
    return found


def _same_dtype(left: object, right: object) -> bool:
    one, other = tensor_of(left), tensor_of(right)
    return one is None or other is None or one.dtype == other.dtype


_MAY_RETURN_INPUT = frozenset(
    {"reshape", "contiguous", "to", "type_as", "dropout", "flatten", "unflatten", "expand_as"}
)


def _arguments_with_schema(node: fx.Node) -> Iterator[tuple[fx.Node, Any]]:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    for position, schema in enumerate(node.target._schema.arguments):
        value = node.kwargs.get(schema.name) if schema.kwarg_only else argument(node, position, schema.name)
        values = value if isinstance(value, list | tuple) else [value]
        yield from ((arg, schema) for arg in values if isinstance(arg, fx.Node))


def _writes(schema: Any) -> bool:
    return schema.alias_info is not None and schema.alias_info.is_write
