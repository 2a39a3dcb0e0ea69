"""Cut a rewritten graph into the stages of a pipeline, with everything that crosses a cut made explicit.

    forward(ids): x0 = embed(ids); x1 = x0 + f(x0); h = read([x0, x1'])  |  y = head(h)          one cut
    ->  stage 0 (ids) -> x0, x1'        stage 1 (x0, x1') -> y

Each value that is used behind a cut is one of these:

replicated   parameters, buffers and constants (get_attr), and inputs of the model: every stage that needs one has it
recomputed   what depends on replicated values alone and draws no random numbers (rotary tables, masks), and cheap
             element-wise results whose inputs cross anyway: a minimum cut over the bytes finds what to carry instead
carried      the rest: a `Value`, which a plan of routes sends, caches or relays (pipeline/planner.py)

Blocks and partial sums are found as such values, they are not looked for. Runs before schedule_reads: a batched
phase 1 would make results for reads of later stages. Each stage is scheduled and fused by itself.

A value that is written into is computed anew with all that is written, or carried as it is at the end of its stage.

Does not handle: values of dynamic shape, writes into a value that another stage made or into a buffer that several
stages use, and tuples that cross (their items do). A parameter that several stages use is copied into each; its
gradients have to be added up.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx, nn

from attnres_rewrite.errors import PartitionError, explain
from attnres_rewrite.fxgraph import can_learn, num_bytes_of, op_name, place_of, tensor_of
from attnres_rewrite.inputs import check_inputs
from attnres_rewrite.passes.bodies import all_written, draw_inside
from attnres_rewrite.passes.carriers import CASTS, VIEWS
from attnres_rewrite.passes.shared_memory import Memory, share_memory


@dataclass(frozen=True, slots=True)
class CarriedValue:
    """A tensor that is made in one stage and read in later ones."""

    name: str
    node: fx.Node
    made: int
    readers: frozenset[int]
    num_bytes: int
    has_gradient: bool  # a trainable parameter feeds it


@dataclass(frozen=True, slots=True)
class StageGraph:
    """One stage: `module(*inputs, *reads)` returns a tuple of `makes`; the last one the outputs of the graph, flat."""

    module: fx.GraphModule
    inputs: tuple[str, ...]  # inputs of the model that this stage takes
    reads: tuple[str, ...]  # names of carried values
    makes: tuple[str, ...]
    recomputed: tuple[str, ...]  # names of nodes that another stage computes, too


@dataclass(frozen=True, slots=True)
class Partition:
    """The stages of one graph. `tied` maps each parameter that several stages use to those stages."""

    stages: tuple[StageGraph, ...]
    values: tuple[CarriedValue, ...]
    tied: Mapping[str, tuple[int, ...]]


def partition(graph: fx.Graph, root: nn.Module, cuts: Sequence[fx.Node]) -> Partition:
    """Cut the graph before each of `cuts`; neither it nor `root`, which holds its parameters, is changed.

    Raises:
        PartitionError: The cuts are not in the order of the graph, a stage would own no parameter, or something that
            cannot be carried crosses a cut.
    """
    stages = _Stages(graph, root, cuts)
    carried = _carried(stages)
    needs = [_needs(stages, carried, stage) for stage in range(stages.count)]
    values = _values(stages, carried, needs)
    built = tuple(_build(stages, need, values, number) for number, need in enumerate(needs))
    _refuse_without_parameters(built)
    owners: dict[str, list[int]] = {}
    for number, stage in enumerate(built):
        for name, _ in stage.module.named_parameters(remove_duplicate=False):
            owners.setdefault(name, []).append(number)
    tied = {name: tuple(used) for name, used in owners.items() if len(used) > 1}
    return Partition(built, tuple(values.values()), tied)


class _Stages:
    """Which stage computes each node; nodes in no stage are replicated or computed wherever they are needed."""

    def __init__(self, graph: fx.Graph, root: nn.Module, cuts: Sequence[fx.Node]) -> None:
        self.nodes = [node for node in graph.nodes if node.target is not check_inputs]
        self.root, self.count = root, len(cuts) + 1
        self.position = {node: position for position, node in enumerate(self.nodes)}
        places = [self.position[cut] for cut in cuts]
        if places != sorted(set(places)):
            raise PartitionError(f"the cuts at nodes {places} are not in the order of the graph")
        self.memory = share_memory(self.nodes, lambda node: all_written(node, root))
        self.free = _free(self.nodes, root, self.memory)
        self.of: dict[fx.Node, int] = {}
        stage = 0
        for position, node in enumerate(self.nodes):
            while stage < len(places) and position >= places[stage]:
                stage += 1
            if node.op == "output":
                self.of[node] = self.count - 1
            elif node not in self.free and node.op == "call_function":
                producer = node.args[0] if node.target is operator.getitem else None
                self.of[node] = self.of.get(producer, stage) if isinstance(producer, fx.Node) else stage
        for piece, members in self.memory.members.items():
            self._refuse_write(members, self.memory.writers[piece])

    def _refuse_write(self, members: Sequence[fx.Node], writers: Sequence[fx.Node]) -> None:
        """Refuse a write that another stage would not see."""
        kept = [node for node in members if node.op != "call_function"]
        users = [user for node in kept for user in node.users]
        stages = sorted({self.of[node] for node in (*members, *users) if node in self.of})
        written = sorted({self.of[node] for node in writers if node in self.of})
        if not written or (written == stages[:1] and (not kept or len(stages) == 1)):
            return
        what = f"{kept[0].target}, which stages {stages} use" if kept else "a value that an earlier stage made"
        raise PartitionError(
            explain(
                f"{op_name(writers[-1])} writes into {what}",
                place_of(writers[-1]),
                "Each stage works on a copy of its own: the write would be lost.",
                "Move the cut, or write the operation out of place.",
            )
        )

    def crossing(self) -> Iterator[fx.Node]:
        """Yield the nodes that a later stage uses."""
        for node, stage in self.of.items():
            if any(self.of.get(user, stage) > stage for user in node.users):
                yield node


def _free(nodes: Sequence[fx.Node], root: nn.Module, memory: Memory) -> set[fx.Node]:
    """Return what every stage can have for itself: replicated, or computed from that without parameters or chance.

    Memory that is written into is free when all its writers are, and when it is no buffer and no input.
    """
    barred = {piece for piece, members in memory.members.items() if any(node.op != "call_function" for node in members)}
    while True:
        free = _free_but_for(barred, nodes, root, memory)
        spoilt = {
            piece
            for piece, writers in memory.writers.items()
            if piece not in barred and not all(node in free for node in writers)
        }
        if not spoilt:
            return free
        barred |= spoilt


def _free_but_for(barred: set[fx.Node], nodes: Sequence[fx.Node], root: nn.Module, memory: Memory) -> set[fx.Node]:
    free: set[fx.Node] = set()
    for node in nodes:
        if node.op in ("placeholder", "get_attr"):
            free.add(node)
        elif node.op == "call_function" and not _draws(node) and draw_inside(node, root, _draws) is None:
            inputs = node.all_input_nodes
            if (
                memory.piece_of[node] not in barred
                and all(entry in free and memory.piece_of[entry] not in barred for entry in inputs)
                and not any(_parameter(root, entry) is not None for entry in inputs)
            ):
                free.add(node)
    return free


def _draws(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _parameter(root: nn.Module, node: fx.Node) -> nn.Parameter | None:
    if node.op != "get_attr":
        return None
    value: object = root
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, nn.Parameter) else None


# computed anew behind a cut where that saves bytes: one pass over what they read
_CHEAP = (
    CASTS
    | VIEWS
    | frozenset(
        "add sub mul div neg square pow mean rsqrt sqrt reciprocal sigmoid silu gelu relu tanh exp clamp".split()
    )
)


def _carried(stages: _Stages) -> set[fx.Node]:
    """Choose the values to carry: the fewest bytes that cut every way from what is costly to what is behind a cut."""
    flow: nx.DiGraph = nx.DiGraph()
    for node, stage in stages.of.items():
        value = tensor_of(node)
        if node.op == "output":
            continue
        # without a capacity an edge cannot be cut
        size = {} if value is None else {"capacity": num_bytes_of(node)}
        flow.add_edge((node, "in"), (node, "out"), **size)
        again = [entry for entry in node.all_input_nodes if entry in stages.of]
        if _is_costly(stages, node) or not again:
            flow.add_edge("made", (node, "in"))
        else:
            for entry in again:
                flow.add_edge((entry, "out"), (node, "in"))
        if any(stages.of.get(user, stage) > stage for user in node.users):
            flow.add_edge((node, "out"), "used")
    if "used" not in flow:
        return set()
    try:
        _, (near, _) = nx.minimum_cut(flow, "made", "used")
    except nx.NetworkXUnbounded as error:
        raise PartitionError(_not_a_tensor(stages)) from error
    return {node for node in stages.of if (node, "in") in near and (node, "out") in flow and (node, "out") not in near}


def _is_costly(stages: _Stages, node: fx.Node) -> bool:
    if op_name(node) not in _CHEAP or _draws(node):
        return True
    inputs = node.all_input_nodes
    # what is written into is carried with all that its stage writes: a node that read it earlier cannot be repeated
    return any(stages.memory.writers_of(entry) and entry not in stages.free for entry in (node, *inputs)) or any(
        _parameter(stages.root, entry) is not None for entry in inputs
    )


def _not_a_tensor(stages: _Stages) -> str:
    node = next(node for node in stages.crossing() if tensor_of(node) is None)
    return explain(
        f"{op_name(node)} is used behind a cut and is not one tensor",
        place_of(node),
        "Only tensors are sent from stage to stage.",
        "Move the cut.",
    )


@dataclass(frozen=True, slots=True)
class _Needs:
    """What one stage takes and computes, in the order of the graph."""

    inputs: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    computed: tuple[fx.Node, ...]


def _needs(stages: _Stages, carried: set[fx.Node], stage: int) -> _Needs:
    inputs: set[fx.Node] = set()
    reads: set[fx.Node] = set()
    computed: set[fx.Node] = set()
    todo = [node for node, own in stages.of.items() if own == stage and node.op != "output"]
    if stage == stages.count - 1:
        todo += stages.nodes[-1].all_input_nodes
    while todo:
        node = todo.pop()
        if node in inputs or node in reads or node in computed:
            continue
        if node.op == "placeholder":
            inputs.add(node)
        elif node in carried and stages.of[node] < stage:
            reads.add(node)
        else:
            computed.add(node)
            todo += node.all_input_nodes
            if node in stages.free:
                todo += stages.memory.writers_of(node)

    def ordered(chosen: set[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(sorted(chosen, key=stages.position.__getitem__))

    return _Needs(ordered(inputs), ordered(reads), ordered(computed))


def _values(stages: _Stages, carried: set[fx.Node], needs: Sequence[_Needs]) -> dict[fx.Node, CarriedValue]:
    trainable = _trainable(stages)
    found: dict[fx.Node, CarriedValue] = {}
    for node in sorted(carried, key=stages.position.__getitem__):
        readers = frozenset(stage for stage, need in enumerate(needs) if node in need.reads)
        if readers:
            found[node] = CarriedValue(node.name, node, stages.of[node], readers, num_bytes_of(node), node in trainable)
    return found


def _trainable(stages: _Stages) -> set[fx.Node]:
    """Return the nodes that a trainable parameter feeds, or that such a node writes into."""
    found: set[fx.Node] = set()
    while True:
        before = len(found)
        for node in stages.nodes:
            parameter = _parameter(stages.root, node)
            value = tensor_of(node)
            learns = value is None or can_learn(value)
            sources = (*node.all_input_nodes, *stages.memory.writers_of(node))
            if (parameter is not None and parameter.requires_grad) or (
                learns and any(entry in found for entry in sources)
            ):
                found.add(node)
        if len(found) == before:
            return found


def _build(stages: _Stages, need: _Needs, values: Mapping[fx.Node, CarriedValue], number: int) -> StageGraph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in (*need.inputs, *need.reads):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in need.computed:
        copies[node] = graph.node_copy(node, lambda old: copies[old])
        copies[node].meta = dict(node.meta)
    made = [value for value in values.values() if value.made == number]
    if number == stages.count - 1:
        graph.output(fx.map_arg(stages.nodes[-1].args[0], lambda old: copies[old]))
    else:
        graph.output(tuple(copies[value.node] for value in made))
    graph.lint()
    module = fx.GraphModule(stages.root, graph, class_name=f"Stage{number}")
    _leave_out_of_state(module, stages.root)
    return StageGraph(
        module,
        tuple(str(node.target) for node in need.inputs),
        tuple(values[node].name for node in need.reads),
        tuple(value.name for value in made),
        tuple(node.name for node in need.computed if node.op == "call_function" and stages.of.get(node) != number),
    )


def _leave_out_of_state(module: fx.GraphModule, root: nn.Module) -> None:
    """Leave constants and buffers that the state dict of the model has not out of that of a stage, too."""
    for name, _ in list(module.named_buffers(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        owner = root.get_submodule(path)
        if leaf not in owner._buffers or leaf in owner._non_persistent_buffers_set:
            module.get_submodule(path)._non_persistent_buffers_set.add(leaf)


def _refuse_without_parameters(stages: Sequence[StageGraph]) -> None:
    for number, stage in enumerate(stages):
        if not any(True for _ in stage.module.parameters()):
            raise PartitionError(
                explain(
                    f"stage {number} of {len(stages)} would own no parameter",
                    None,
                    "It would have nothing to compute or to train.",
                    "Use fewer stages, or other cuts.",
                )
            )
