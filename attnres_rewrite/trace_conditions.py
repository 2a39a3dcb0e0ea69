"""What torch.export took for granted about input sizes while it traced -> conditions that are checked at each call.

    if ids.shape[1] > 64: ...   traced at 16 tokens   ->   "ids.size()[1] <= 64", ("<=", ("size", 0, 1), 64)

The graph holds one side of such a choice; at other sizes the model takes the other one. A condition is plain data: an
operator by name and its operands, a size as ("size", number of the tensor, dimension).
"""

import ast
import inspect
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnres_rewrite.errors import CaptureError, explain

# a text for the error message, and nested tuples
Condition = tuple[str, Any]

_OPERATORS: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "/": operator.truediv,
    "%": operator.mod,
    "**": operator.pow,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "neg": operator.neg,
    "not": operator.not_,
    "min": min,
    "max": max,
}
_SIGNS: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "//",
    ast.Div: "/",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.USub: "neg",
    ast.Not: "not",
    ast.And: "and",
    ast.Or: "or",
}
# an input that is a view has guards on the tensor it views, too
_LAYOUT = re.compile(r"\.(stride|storage_offset)\(\)|\._base\b")


def conditions_from(guards: Sequence[str], paths: Sequence[str], tensors: Sequence[int]) -> tuple[Condition, ...]:
    """Parse the guards of an exported program; those on strides, and on what an input is a view of, are left out, as
    values do not depend on them.

    Args:
        guards: As torch writes them, "L['ids'].size()[1] <= 64", or with the bare name, "ids.size()[1] <= 64".
        paths: Of each input of the graph, "['ids']".
        tensors: Which of the inputs are tensors; a condition numbers these.

    Raises:
        CaptureError: A guard is on something else than sizes of tensors.
    """
    found: list[Condition] = []
    for guard in guards:
        if _LAYOUT.search(guard):
            continue
        text = re.sub(r"L\['(\w+)'\]", r"\1", guard)
        try:
            tree = _tree(ast.parse(guard, mode="eval").body, paths, tensors)
        except (LookupError, ValueError) as why:
            raise CaptureError(
                explain(
                    f"the trace holds only where {text}, which cannot be checked at each call",
                    None,
                    f"{type(why).__name__}: {why}",
                    "Fix every shape: dynamic_shapes={}.",
                )
            ) from why
        found.append((text, tree))
    return tuple(found)


def guards_of_module(guards_fn: nn.Module) -> list[str]:
    """Return the guards on sizes that are in the `_guards_fn` of `ExportedProgram.module()`: its function asserts each.

    Raises:
        CaptureError: It is not the function that torch.export writes.
    """
    functions, seen = [guards_fn.forward], set[Callable[..., Any]]()
    while functions:
        function = functions.pop()
        if not inspect.isfunction(function) or function in seen:
            continue
        seen.add(function)
        if function.__code__.co_filename == "<string>":
            texts = [text for text in function.__code__.co_consts if isinstance(text, str) and ".size()" in text]
            return [text.removeprefix("Guard failed: ") for text in texts]
        functions += [cell.cell_contents for cell in function.__closure__ or ()]
    raise CaptureError(
        explain(
            "the graph module has guards of torch.export that cannot be read",
            None,
            "It is ExportedProgram.module(), and its _guards_fn is written in another way than this release knows.",
            "Give the ExportedProgram itself.",
        )
    )


def _tree(node: ast.AST, paths: Sequence[str], tensors: Sequence[int]) -> Any:
    def inner(*nodes: ast.AST) -> tuple[Any, ...]:
        return tuple(_tree(each, paths, tensors) for each in nodes)

    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=source, attr="size")), slice=ast.Constant(value=dim)
        ):
            return ("size", tensors.index(_input_number(ast.unparse(source), paths)), dim)
        case ast.BinOp(left, sign, right):
            return (_SIGNS[type(sign)], *inner(left, right))
        case ast.UnaryOp(sign, operand):
            return (_SIGNS[type(sign)], *inner(operand))
        case ast.BoolOp(sign, values):
            return (_SIGNS[type(sign)], *inner(*values))
        case ast.Compare(left, [sign], [right]):
            return (_SIGNS[type(sign)], *inner(left, right))
        case ast.Call(func=ast.Name(id="min" | "max" as name), args=args):
            return (name, *inner(*args))
        case ast.Call(func=ast.Attribute(ast.Name("torch"), "sym_min" | "sym_max" as name), args=args):
            return (name.removeprefix("sym_"), *inner(*args))
        case _:
            raise ValueError(ast.unparse(node))


def _input_number(source: str, paths: Sequence[str]) -> int:
    """Return which input a guard calls `source`: L['x']['a'], L['flat_args'][3], L['args'][0], L['kwargs']['x'], x."""
    quoted = source if source.startswith("L[") else re.sub(r"^\w+", r"L['\g<0>']", source)
    path = quoted.removeprefix("L")
    if flat := re.fullmatch(r"\['flat_args'\]\[(\d+)\]", path):
        return int(flat[1])
    # what a signature gathers in *args and **kwargs is an input of its own in the graph
    spellings = (path, re.sub(r"^\['(\w+)'\]\[(\d+)\]", r"['\1_\2']", path), re.sub(r"^\['\w+'\](?=\[')", "", path))
    found = [paths.index(spelling) for spelling in spellings if spelling in paths]
    if not found:
        raise LookupError(f"no input is called {source}")
    return found[0]


def input_paths(names: Sequence[str], in_spec: pytree.TreeSpec) -> list[str]:
    """Return the path of every input of a graph, "['batch']['ids']", from the names and the nesting of its call."""
    args, kwargs = pytree.tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
    call = dict(zip(names, args, strict=False)) | kwargs
    paths = {number: pytree.keystr(path) for path, number in pytree.tree_leaves_with_path(call)}
    return [paths[number] for number in range(in_spec.num_leaves)]


def holds(tree: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Evaluate a condition on the sizes of `tensors`."""
    if not isinstance(tree, tuple | list):
        return tree
    name, *operands = tree
    if name == "size":
        return tensors[operands[0]].shape[operands[1]]
    values = [holds(operand, tensors) for operand in operands]
    if name == "and":
        return all(values)
    if name == "or":
        return any(values)
    return _OPERATORS[name](*values)
