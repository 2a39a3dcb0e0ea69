"""Part of a graph as boxes in one column and the wires between them: nodes -> Sketch.

Nodes of one module become one box. Boxes stand in the order in which the graph runs, so every wire goes down.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from attnres_rewrite.fxgraph import module_classes, module_path, op_name
from attnres_rewrite.kernels.merge.op import add_merge_norm

BoxKind = Literal["input", "norm", "sublayer", "ops", "add", "read", "phase", "output"]
Tint = Literal["stream", "root", "block", "partial", "mix", "flow"]


@dataclass(frozen=True, slots=True)
class Box:
    """One box: `title` and `note` are its two lines; `tint` is what it sends on, unless its reader says otherwise."""

    kind: BoxKind
    title: str
    note: str
    tint: Tint = "flow"


@dataclass(frozen=True, slots=True)
class Wire:
    """A value from one box to another, both by their place in the column. `port` tells apart values of one box."""

    start: int
    end: int
    tint: Tint
    port: str = ""


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is drawn of one graph."""

    boxes: tuple[Box, ...]
    wires: tuple[Wire, ...]


@dataclass(frozen=True, slots=True)
class Operand:
    """An input of a special node that has its own colour."""

    node: fx.Node
    tint: Tint | None = None


@dataclass(frozen=True, slots=True)
class Special:
    """A node with a box of its own, and those of its inputs that are drawn."""

    box: Box
    operands: tuple[Operand, ...]


# what only changes the form of a value: no box, the wire goes through
_FORM_ONLY = frozenset(
    """getitem to _to_copy type_as clone contiguous view reshape movedim permute transpose expand expand_as alias
    detach unsqueeze squeeze flatten unflatten _assert_tensor_metadata""".split()
)


def sketch(
    window: Sequence[fx.Node],
    specials: Mapping[fx.Node, Special],
    inputs: Mapping[fx.Node, Box],
    name_box: Callable[[fx.Node], tuple[str, str]],
) -> Sketch:
    """Draw the nodes of `window`, in graph order.

    Args:
        window: What is drawn.
        specials: Its nodes that get a box each.
        inputs: Values from outside, in the order of their boxes, which come first.
        name_box: Returns the module whose nodes are one box with this one, and its class; "" for none.
    """
    column = _Column([*inputs.values()], {node: row for row, node in enumerate(inputs)})
    runs: list[tuple[str, str, list[fx.Node]]] = []
    for node in window:
        if node in specials:
            runs.append(("", "", [node]))
            continue
        module, kind = name_box(node)
        if is_part_of_read(node) or (not module and op_name(node) in _FORM_ONLY):
            continue
        if runs and runs[-1][0] == module and runs[-1][2][0] not in specials and (module or _reads(node, runs[-1][2])):
            runs[-1][2].append(node)
        else:
            runs.append((module, kind, [node]))
    for module, kind, nodes in runs:
        box = specials[nodes[0]].box if nodes[0] in specials else _box(module, kind, nodes)
        column.rows.update(dict.fromkeys(nodes, len(column.boxes)))
        column.boxes.append(box)
    wires = dict.fromkeys(
        wire for _, _, nodes in runs for node in nodes for wire in _wires_into(node, column, specials)
    )
    return Sketch(tuple(column.boxes), tuple(wires))


def _reads(node: fx.Node, run: Sequence[fx.Node]) -> bool:
    return any(entry in run or origin(entry) in run for entry in node.all_input_nodes)


@dataclass(slots=True)
class _Column:
    boxes: list[Box]
    rows: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])


def _box(module: str, kind: str, nodes: Sequence[fx.Node]) -> Box:
    names = list(dict.fromkeys(op_name(node) for node in nodes))
    count = f"{len(nodes)} operation{'s' * (len(nodes) > 1)}"
    if not module:
        is_norm = bool({"layer_norm", "rms_norm"} & set(names))
        return Box("norm" if is_norm else "ops", ", ".join(names), count)
    is_norm = names_norm(module, kind)
    return Box("norm" if is_norm else "sublayer", module, kind or count)


def names_norm(module: str, kind: str) -> bool:
    """Say whether a module is a norm by its class, or by its own name where the class is not known."""
    return "norm" in (kind or module.rpartition(".")[2]).lower()


def _wires_into(node: fx.Node, column: _Column, specials: Mapping[fx.Node, Special]) -> Sequence[Wire]:
    special = specials.get(node)
    operands = special.operands if special else [Operand(entry) for entry in node.all_input_nodes]
    wires: list[Wire] = []
    for operand in operands:
        producer, port = _producer(operand.node, column)
        if producer is not None and producer != column.rows[node]:
            tint = operand.tint or column.boxes[producer].tint
            wires.append(Wire(producer, column.rows[node], tint, port))
    return wires


def _producer(node: fx.Node, column: _Column) -> tuple[int | None, str]:
    port = ""
    while node not in column.rows:
        if op_name(node) not in _FORM_ONLY or not node.all_input_nodes:
            return None, ""
        if node.args[0] in column.rows and is_total(node):
            port = "total"
        node = node.all_input_nodes[0]
    return column.rows[node], port


def is_part_of_read(node: fx.Node) -> bool:
    """Say whether a node only takes one of the two results of add_merge_norm: the partial sum, the normed mix."""
    made_by = node.args[0] if node.args else None
    return isinstance(made_by, fx.Node) and made_by.target is add_merge_norm


def is_total(node: fx.Node) -> bool:
    """Say whether a node is the new partial sum that add_merge_norm returns beside the normed mix."""
    return is_part_of_read(node) and node.args[1:] == (0,)


def origin(node: fx.Node) -> fx.Node:
    """Look through what only changes the form of a value: casts and views of one source are one source."""
    while op_name(node) in _FORM_ONLY and not is_total(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def between(graph: fx.Graph, starts: set[fx.Node], ends: set[fx.Node]) -> list[fx.Node]:
    """Return the nodes on the ways from `starts` to `ends`, in graph order; the ends are in it, the starts are not."""
    below: set[fx.Node] = set(starts)
    for node in graph.nodes:
        if any(entry in below for entry in node.all_input_nodes):
            below.add(node)
    above: set[fx.Node] = set(ends)
    for node in reversed(graph.nodes):
        if node in above:
            above.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in below and node in above and node not in starts]


@dataclass(frozen=True, slots=True)
class ModuleNames:
    """Which module of a node becomes its box: the outermost that neither adds to the stream nor holds a norm of it."""

    open_modules: frozenset[str]  # looked into, never drawn as one box
    prefix: str  # the layer's own name, left out of titles

    def __call__(self, node: fx.Node) -> tuple[str, str]:
        """Return the module of the box of `node` and its class; "" where its layer calls the op itself."""
        classes = module_classes(node)
        for depth, module in enumerate(module_path(node)):
            if module and module not in self.open_modules:
                return module.removeprefix(f"{self.prefix}."), classes[depth].rpartition(".")[2]
        return "", ""
