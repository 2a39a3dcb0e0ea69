"""unflatten(): the flat graph of a rewrite -> submodules that are called again, for tools that work layer by layer.

    forward(ids):  ...; h3 = read([x0, b1, p3], layers.3.attn_res.0.query); p4 = p3 + linear(h3, layers.3.q.weight); ...
    ->  forward(ids):  ...; p4 = layers.3(x0, b1, p3); p5 = layers.4(x0, b1, p4); ...

fully_shard gathers the parameters of a module before it is called, an activation checkpoint keeps what is given to it,
Module.compile() compiles it: all need calls, and a rewritten graph has none. A unit is what stands between the first
and the last use of a module's parameters, with the adds that lead to its first read. Reads are scheduled in each unit
by itself, as a phase 1 for reads of several layers would need the queries of layers that are not gathered yet.
"""

import fnmatch
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from attnres_rewrite.config import Schedule
from attnres_rewrite.errors import PartitionError, explain
from attnres_rewrite.example_values import unscheduled_graph
from attnres_rewrite.fxgraph import module_path
from attnres_rewrite.module import ModalModule, RewrittenModule, attribute, copy_tree, require_rewritten
from attnres_rewrite.passes.fuse_reads import fuse_reads
from attnres_rewrite.passes.relax_checks import relax_checks
from attnres_rewrite.passes.schedule_reads import schedule_reads


def unflatten(new: RewrittenModule, modules: str | Sequence[str]) -> ModalModule:
    """Make some modules of a rewritten model callable again, each with its part of the graph.

    Args:
        new: What `rewrite` or `load` returned; it is not changed.
        modules: Names, or patterns with * for a part between dots: "model.layers.*".

    Returns:
        A torch.fx.GraphModule with the signature, outputs, names and the very parameters of `new`, whose graph calls
        those modules, in train mode and in eval mode. They can be wrapped, replaced in their parents, and compiled
        one by one; fully_shard and torch.utils.checkpoint work on them.

    Raises:
        ValueError: No module has such a name, or one is inside of another.
        PartitionError: A module is called twice or beside another, or one of its parameters is used elsewhere, too.
        TypeError: `new` is not rewritten, or `modules` names nothing.
    """
    require_rewritten(new, "unflatten")
    names = _matching(new, (modules,) if isinstance(modules, str) else modules)
    _refuse_shared(new, names)
    tree = copy_tree(new)
    cut: dict[int, _Cut] = {}
    for mode, program in new.programs.items():
        if id(program) not in cut:
            cut[id(program)] = _cut(unscheduled_graph(new, mode), new, names, new.config.schedule)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        holder = attribute(tree, name)
        for found in cut.values():
            holder._modules.update(found.bodies[name])
        graphs = {mode: cut[id(program)].units[name] for mode, program in new.programs.items()}
        attribute(tree, owner)._modules[leaf] = ModalModule(holder, graphs, new.training, "Unit")
    graphs = {mode: cut[id(program)].graph for mode, program in new.programs.items()}
    return ModalModule(tree, graphs, new.training, "UnflattenedModule")


def _matching(new: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that the patterns name, in the order of the model."""
    # callers are not all type-checked
    if not isinstance(patterns, Sequence) or not all(isinstance(each, str) for each in patterns) or not patterns:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"modules is a name, a pattern, or a sequence of them; got {patterns!r}")
    found: list[str] = []
    known = [name for name, _ in new.named_modules() if name]
    for pattern in patterns:
        parts = pattern.split(".")
        matched = [name for name in known if _matches(name.split("."), parts)]
        if not matched:
            raise ValueError(f"no module is named {pattern!r}; the model has {', '.join(known[:8])}, ...")
        found += matched
    names = tuple(name for name in known if name in found)
    for name in names:
        if inner := next((other for other in names if other.startswith(f"{name}.")), None):
            raise ValueError(f"{inner} is inside of {name}: name one of them")
    return names


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatch.fnmatchcase, name, pattern))


def _refuse_shared(new: nn.Module, names: Sequence[str]) -> None:
    """Refuse a parameter that has a name in a unit and another one outside of it."""
    owners: dict[int, tuple[str, str]] = {}
    for name, parameter in new.named_parameters(remove_duplicate=False):
        unit = _unit_of(name, names)
        first, other = owners.setdefault(id(parameter), (name, unit))
        if other != unit:
            raise _cannot(f"{first} and {name} are one parameter", "It would be gathered with one of them alone.")


def _cannot(what: str, why: str) -> PartitionError:
    return PartitionError(explain(what, None, why, "Name other modules, or leave out the one that has it."))


def _unit_of(target: str, names: Sequence[str]) -> str:
    return next((name for name in names if target.startswith(f"{name}.")), "")


@dataclass(frozen=True, slots=True)
class _Cut:
    """A graph that calls units, their graphs, and the bodies of higher-order operations in them."""

    graph: fx.Graph
    units: Mapping[str, fx.Graph]
    bodies: Mapping[str, Mapping[str, nn.Module]]


def _cut(graph: fx.Graph, root: nn.Module, names: Sequence[str], schedule: Schedule) -> _Cut:
    _put_off_reads(graph)
    nodes = list(graph.nodes)
    regions = _regions(nodes, root, names)
    outer, env = fx.Graph(), dict[fx.Node, fx.Node]()
    outer._codegen = graph._codegen
    units: dict[str, fx.Graph] = {}
    bodies: dict[str, dict[str, nn.Module]] = {}
    unit_at = {region.start: (name, region) for name, region in regions.items()}
    inside = {position for region in regions.values() for position in region}

    def moved(node: fx.Node) -> fx.Node:
        if node not in env:  # a parameter or constant, read where it is needed
            env[node] = outer.node_copy(node)
            env[node].meta = dict(node.meta)
        return env[node]

    for position, node in enumerate(nodes):
        if position in unit_at:
            name, region = unit_at[position]
            members = [nodes[each] for each in region if nodes[each].op != "get_attr"]
            unit = _Unit(name, members, root)
            units[name], bodies[name] = unit.graph, unit.bodies
            call = outer.call_module(name, tuple(moved(value) for value in unit.taken))
            for number, value in enumerate(unit.made):
                only = len(unit.made) == 1
                env[value] = call if only else outer.call_function(operator.getitem, (call, number))
                env[value].meta = dict(value.meta)
        if position not in inside and node.op != "get_attr":
            env[node] = outer.node_copy(node, moved)
            env[node].meta = dict(node.meta)
    for each in (outer, *units.values()):
        schedule_reads(each, schedule)
        fuse_reads(each)
        relax_checks(each)
    return _Cut(outer, units, bodies)


def _put_off_reads(graph: fx.Graph) -> None:
    """Move each read to its first reader: of two streams, one may be done with a layer before the other is."""
    for node in reversed(list(graph.nodes)):
        if node.users and ("attn_res" in node.meta or "gate_of" in node.meta):
            min(node.users).prepend(node)


def _regions(nodes: Sequence[fx.Node], root: nn.Module, names: Sequence[str]) -> dict[str, range]:
    """Return which nodes each unit is: from the first that uses one of its parameters to the end of its code."""
    used: dict[str, list[int]] = {name: [] for name in names}
    position = {node: number for number, node in enumerate(nodes)}
    unit_of: dict[int, str] = {}  # of the nodes that use a parameter
    for node in nodes:
        if node.op == "get_attr" and isinstance(attribute(root, str(node.target)), nn.Parameter):
            unit = _unit_of(str(node.target), names)
            places = [position[user] for user in node.users]
            unit_of |= dict.fromkeys(places, unit)
            used.get(unit, []).extend(places)
    for name, places in used.items():
        if not places:
            raise _cannot(f"{name} has no parameter that the graph uses", "There is nothing to call.")
    regions: dict[str, range] = {}
    end, before = 0, ""
    for name in sorted(names, key=lambda name: min(used[name])):
        if min(used[name]) < end:
            why = "One of them calls the other, is called twice, or they run side by side."
            raise _cannot(f"{name} begins before {before} has ended", why)
        end, before = max(used[name]) + 1, name
        while _is_code_of(nodes[end], name) and unit_of.get(end, name) == name:
            end += 1
        regions[name] = range(min(used[name]), end)
    return regions


def _is_code_of(node: fx.Node, unit: str) -> bool:
    """Say whether a node is of the code of a module; one that reads a parameter stands anywhere."""
    if node.op != "call_function":
        return node.op == "get_attr"
    return any(f"{path}.".startswith(f"{unit}.") for path in module_path(node))


class _Unit:
    """The graph of one unit; `taken` and `made` are the nodes outside that it reads, and those that others read."""

    def __init__(self, name: str, members: Sequence[fx.Node], root: nn.Module) -> None:
        self.name, self.root, self.graph = name, root, fx.Graph()
        self.bodies: dict[str, nn.Module] = {}
        own = set(members)
        self.taken = tuple(dict.fromkeys(value for value in self._inputs(members) if value not in own))
        self.made = tuple(node for node in members if any(user not in own for user in node.users))
        env: dict[fx.Node, fx.Node] = {}
        for value in self.taken:
            env[value] = self.graph.placeholder(value.name)
            env[value].meta = dict(value.meta)
        for node in members:
            env[node] = self.graph.node_copy(node, lambda old: env[old] if old in env else self._attribute(old, env))
            env[node].meta = dict(node.meta)
        outputs = tuple(env[node] for node in self.made)
        self.graph.output(outputs[0] if len(outputs) == 1 else outputs)

    def _inputs(self, members: Sequence[fx.Node]) -> Iterator[fx.Node]:
        for node in members:
            yield from (value for value in node.all_input_nodes if not self._is_own(value))

    def _is_own(self, node: fx.Node) -> bool:
        """Say whether a node reads what the unit has: its parameters, its buffers, the body of an operation."""
        if node.op != "get_attr":
            return False
        target = str(node.target)
        return target.startswith(f"{self.name}.") or isinstance(attribute(self.root, target), nn.Module)

    def _attribute(self, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        target = str(node.target)
        value = attribute(self.root, target)
        if isinstance(value, nn.Module):
            target = f"body_{target.replace('.', '_')}"
            self.bodies[target] = value
        else:
            target = target.removeprefix(f"{self.name}.")
        env[node] = self.graph.get_attr(target)
        env[node].meta = dict(node.meta)
        return env[node]
