"""Draw one layer as it was captured, from the original graph of a program.

x4 -> norm -> attention -> (+) -> norm -> mlp -> (+) -> x6, with the stream beside it
"""

from torch import fx

from attnres_rewrite.fxgraph import module_classes, module_path
from attnres_rewrite.module import Program
from attnres_rewrite.page.choose_layer import Layer
from attnres_rewrite.page.sketch import (
    Box,
    ModuleNames,
    Operand,
    Sketch,
    Special,
    Wire,
    between,
    names_norm,
    origin,
    sketch,
)
from attnres_rewrite.records import BlockPlan

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def numbered(letter: str, number: int) -> str:
    """Write a letter with an index: x, 12 -> x₁₂."""
    return letter + str(number).translate(_SUBSCRIPTS)


def sketch_before(program: Program, plan: BlockPlan, layer: Layer) -> Sketch:
    """Draw the adds of the stream, and the boxes between them."""
    states = plan.stream.states
    first = states[layer.first - 1]
    window = between(program.original, {first}, {states[layer.last]})
    inputs = {first: _state(layer.first - 1)}
    specials: dict[fx.Node, Special] = {}
    for number in range(layer.first, layer.last + 1):
        update = plan.stream.updates[number - 1]
        note = f"{numbered('x', number)} = {numbered('x', number - 1)} + {numbered('u', number)}"
        before = states[number - 1]
        # a cast on the way may be one that a norm made for itself, and would be drawn as coming from there
        carried = origin(update.stream)
        came_from = before if carried is origin(before) else carried
        operands = Operand(came_from, "stream"), Operand(update.branch)
        specials[update.add] = Special(Box("add", "add", note, "stream"), operands)
        branch = origin(update.branch)
        if branch not in window and branch not in inputs:
            is_state = branch in states
            inputs[branch] = _state(states.index(branch)) if is_state else _from_outside(number)
    drawn = sketch(window, specials, inputs, module_names(program, plan, layer))
    end = Box("output", numbered("x", layer.last), "to what follows")
    down = Wire(len(drawn.boxes) - 1, len(drawn.boxes), "stream")
    return Sketch((*drawn.boxes, end), (*drawn.wires, down))


def _state(number: int) -> Box:
    note = f"the root and {number} update{'s' * (number > 1)}, added up" if number else "the root"
    return Box("input", numbered("x", number), note, "stream")


def _from_outside(update: int) -> Box:
    return Box("input", numbered("u", update), "from outside of the layer")


def module_names(program: Program, plan: BlockPlan, layer: Layer) -> ModuleNames:
    """Say which modules are looked into: those that add to the stream, and those that hold a norm which reads it."""
    # the layer before may scale the stream behind its last add
    opened = {module for update in plan.stream.updates for module in module_path(update.add)}
    states = set(plan.stream.states)
    for node in program.original.nodes:
        if any(origin(entry) in states for entry in node.all_input_nodes):
            opened.update(_around_norm(node))
    return ModuleNames(frozenset(opened), layer.name)


def _around_norm(node: fx.Node) -> tuple[str, ...]:
    """Return the modules around the norm that a node belongs to; none when it is in no norm."""
    classes = module_classes(node)
    for depth, module in enumerate(module_path(node)):
        if names_norm(module, classes[depth].rpartition(".")[2]):
            return module_path(node)[:depth]
    return ()
