"""What the body of a call does that the call does not show: it draws random numbers, or writes into what it is given.

    with torch.no_grad(): self.seen.add_(1)     ->     wrap_with_set_grad_enabled(False, body, seen)     writes seen

torch.export keeps what is under no_grad, autocast or torch.cond as one call of a graph of its own.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

from attnres_rewrite.fxgraph import written_inputs
from attnres_rewrite.passes.shared_memory import share_memory


def bodies_of(call: fx.Node, root: nn.Module) -> list[fx.GraphModule]:
    """Return the graphs that a call is given, such as the two branches of torch.cond."""
    return [body for entry in call.all_input_nodes if (body := _body(entry, root)) is not None]


def draw_inside(call: fx.Node, root: nn.Module, draws: Callable[[fx.Node], bool]) -> fx.Node | None:
    """Return the first node in the bodies of a call, and in theirs, that draws random numbers."""
    for body in bodies_of(call, root):
        for node in body.graph.nodes:
            found = node if draws(node) else draw_inside(node, body, draws)
            if found is not None:
                return found
    return None


def all_written(call: fx.Node, root: nn.Module) -> list[fx.Node]:
    """Return the inputs that a call, or a body of it, writes into; all of them where it is not known which."""
    found = dict.fromkeys(written_inputs(call))
    operands = list(_operands(call, root))
    for body in bodies_of(call, root):
        memory = share_memory(body.graph.nodes, lambda node, within=body: all_written(node, within))
        places = body.graph.find_nodes(op="placeholder")
        written = [number for number, place in enumerate(places) if memory.writers_of(place)]
        if written and len(places) != len(operands):
            return [entry for entry in call.all_input_nodes if _body(entry, root) is None]
        found |= dict.fromkeys(entry for number in written if isinstance(entry := operands[number], fx.Node))
    return list(found)


def _operands(call: fx.Node, root: nn.Module) -> Iterator[Any]:
    """Yield what stands behind the bodies: (enabled, body, a, b) and (predicate, body, body, (a, b)) give a, b."""
    last = max((place for place, entry in enumerate(call.args) if _body(entry, root) is not None), default=-1)
    for entry in call.args[last + 1 :]:
        if isinstance(entry, list | tuple):
            yield from entry
        else:
            yield entry


def _body(entry: object, root: nn.Module) -> fx.GraphModule | None:
    if not isinstance(entry, fx.Node) or entry.op != "get_attr":
        return None
    value: object = root
    for part in str(entry.target).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, fx.GraphModule) else None
