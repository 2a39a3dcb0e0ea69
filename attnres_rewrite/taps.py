"""A captured graph -> the same computation, which also returns what a diagnosis needs of each batch.

    x1 = x0 + f1;  y = g(x1)
    ->  u1 = tap(f1, anchor_1);  x1 = x0 + u1;  y = g(x1);  return y, [squares(u1), squares(x1), ...]

*tap*     the identity on an update. Its anchor is a zero that does nothing else, and its gradient by definition the sum
          of squares of the update's: one backward to the anchors gives all of them, and no gradient of a parameter.
*squares* the number of elements of a tensor, and the sum of their squares, float64.

Only these small sums leave the graph. The original graph is rewritten anew, and its reads are not scheduled: each is
one node, and gives its weights as well.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.copying import copy_graph, map_plan
from attnres_rewrite.fxgraph import tensor_of
from attnres_rewrite.kernels.read.op import block_attn_res, read_with_weights
from attnres_rewrite.kernels.variant_read.op import variant_attn_res, variant_read_with_weights
from attnres_rewrite.module import Program
from attnres_rewrite.passes.insert_reads import insert_reads
from attnres_rewrite.records import BlockPlan, Update

aten = torch.ops.aten

# "update": what is added. "sum": the partial sum that includes it; of the original, the state. "mix": what readers of a
# state see. "weights": those of the read of a state.
Kind = Literal["update", "sum", "mix", "weights"]


@dataclass(frozen=True, slots=True)
class Figure:
    """What one of a tapped graph's figures is about: update or state `number` of stream `stream`."""

    kind: Kind
    stream: int
    number: int


@dataclass(frozen=True, slots=True)
class TappedGraph:
    """A graph that takes its flat inputs and an anchor for each update, and returns outputs and figures.

    Anchors are in the order of the figures of kind "update": stream after stream. Of kind "weights" a figure is what
    `token_moments` returns, of any other what `squares` does.
    """

    module: fx.GraphModule
    figures: tuple[Figure, ...]
    out_spec: Any

    def run(self, leaves: Sequence[Any], anchors: Tensor) -> tuple[Any, list[tuple[Any, ...]]]:
        """Run on flat inputs and anchors [updates], float64 zeros; outputs are structured as the model's are."""
        outputs, figures = self.module(*leaves, anchors)
        if self.out_spec is not None:
            outputs = pytree.tree_unflatten(list(outputs), self.out_spec)
        return outputs, figures


def tap_rewrite(program: Program, config: AttnResConfig, values: Mapping[str, Any]) -> TappedGraph:
    """Tap the rewritten graph of one mode; `values` has what its get_attr nodes read, by target."""
    graph, plans, taps = _with_taps(program)
    insert_reads(graph, plans, config)
    wanted = _updates_and_roots(plans, taps, sums=[[_summed(tap, config) for tap in of] for of in taps])
    states = {read.name: (index, read.state) for index, plan in enumerate(plans) for read in plan.reads}
    gated = {node.meta["gate_of"]: node for node in graph.nodes if "gate_of" in node.meta}
    for name, mix, weights in weigh_reads(graph):
        index, state = states[name]
        # what a gated read gives its readers is the running sum with its mix added
        wanted |= {Figure("mix", index, state): gated.get(name, mix), Figure("weights", index, state): weights}
    numbers = {
        node: (index, state)
        for index, plan in enumerate(plans)
        for state, node in enumerate(plan.stream.states)
        if state
    }
    for index, plan in enumerate(plans):
        if plan.stream.root in numbers:  # it starts at a state of another, whose mix took its place
            wanted[Figure("mix", index, 0)] = wanted[Figure("mix", *numbers[plan.stream.root])]
    return _tapped(graph, wanted, values)


def tap_original(program: Program, values: Mapping[str, Any]) -> TappedGraph:
    """Tap the graph of one mode as it was captured: the same figures, but for those of reads."""
    graph, plans, taps = _with_taps(program)
    sums = [[update.add for update in plan.stream.updates] for plan in plans]
    return _tapped(graph, _updates_and_roots(plans, taps, sums), values)


def _with_taps(program: Program) -> tuple[fx.Graph, list[BlockPlan], list[list[fx.Node]]]:
    """Copy the original graph and put a tap in front of every update; the anchors are a new last input."""
    graph, copies = copy_graph(program.original)
    plans = [map_plan(plan, copies) for plan in program.plans]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        given = graph.placeholder("attn_res_anchors")
    with graph.inserting_after(given):
        anchors = graph.call_function(aten.unbind.int, (given,))
    taps: list[list[fx.Node]] = []
    for plan in plans:
        done = sum(map(len, taps))
        taps.append([_put_tap(graph, update, anchors, done + n) for n, update in enumerate(plan.stream.updates)])
    return graph, plans, taps


def _put_tap(graph: fx.Graph, update: Update, anchors: fx.Node, index: int) -> fx.Node:
    value, like = update.branch, tensor_of(update.add)
    branch = tensor_of(value)
    assert like is not None
    assert branch is not None
    with graph.inserting_before(update.add):
        # shapes that are equal at the example inputs may differ in other batches
        value = graph.call_function(aten.expand_as.default, (value, update.stream))
        if branch.dtype != like.dtype:
            value = graph.call_function(aten.to.dtype, (value, like.dtype))
        tapped = graph.call_function(tap, (value, graph.call_function(operator.getitem, (anchors, index))))
    tapped.meta = dict(update.add.meta)
    update.add.update_arg(update.branch_position, tapped)
    return tapped


def _summed(tap: fx.Node, config: AttnResConfig) -> fx.Node:
    """Return the partial sum that an update went into; behind it, with gates, the running sum is made."""
    partial, *running = tap.users
    assert len(running) == config.gate
    return partial


def _updates_and_roots(
    plans: Sequence[BlockPlan], taps: Sequence[Sequence[fx.Node]], sums: Sequence[Sequence[fx.Node]]
) -> dict[Figure, fx.Node]:
    wanted: dict[Figure, fx.Node] = {}
    for index, plan in enumerate(plans):
        wanted[Figure("mix", index, 0)] = plan.stream.root
        for number, (update, summed) in enumerate(zip(taps[index], sums[index], strict=True), start=1):
            wanted |= {Figure("update", index, number): update, Figure("sum", index, number): summed}
    return wanted


_WITH_WEIGHTS: dict[Any, Any] = {
    block_attn_res: read_with_weights,
    variant_attn_res: variant_read_with_weights,
}


def weigh_reads(graph: fx.Graph) -> list[tuple[str, fx.Node, fx.Node]]:
    """Make every direct read give its weights, too.

    Returns:
        For each read its name, its mix [..., D] and its weights [..., S], or [..., H, S] with several heads.
    """
    found: list[tuple[str, fx.Node, fx.Node]] = []
    for read in [node for node in graph.nodes if node.target in _WITH_WEIGHTS]:
        with graph.inserting_before(read):
            both = graph.call_function(_WITH_WEIGHTS[read.target], read.args, read.kwargs)
            mix, weights = (graph.call_function(operator.getitem, (both, part)) for part in range(2))
        mix.meta = dict(read.meta)
        read.replace_all_uses_with(mix)
        graph.erase_node(read)
        found.append((read.meta["attn_res"], mix, weights))
    return found


def _tapped(graph: fx.Graph, wanted: Mapping[Figure, fx.Node], values: Mapping[str, Any]) -> TappedGraph:
    made: list[fx.Node] = []
    for figure, node in wanted.items():
        # next to its tensor, which need not live until the end
        with graph.inserting_after(node):
            made.append(graph.call_function(token_moments if figure.kind == "weights" else squares, (node,)))
    module, out_spec = returning(graph, made, values)
    return TappedGraph(module, tuple(wanted), out_spec)


def returning(graph: fx.Graph, nodes: Sequence[fx.Node], values: Mapping[str, Any]) -> tuple[fx.GraphModule, Any]:
    """Return a module that takes flat inputs and returns (flat outputs, [nodes]), and the structure of the outputs."""
    info = getattr(graph._codegen, "pytree_info", None)
    (output,) = graph.find_nodes(op="output")
    output.args = ((output.args[0], list(nodes)),)
    graph.set_codegen(CodeGen())
    graph.lint()
    read = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    module = fx.GraphModule({name: values[name] for name in read}, graph)
    return module, None if info is None else info.out_spec


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        del ctx, anchor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        del ctx
        return grads[0], squares(grads[0])[1]


def tap(update: Tensor, anchor: Tensor) -> Tensor:
    """Return the update. The gradient of its anchor [] is the sum of squares of the gradient of the update."""
    return _Tap.apply(update, anchor)  # pyright: ignore[reportReturnType]


def squares(value: Tensor) -> tuple[int, Tensor]:
    """Return the number of elements, and the sum of their squares [], float64, detached."""
    work = torch.promote_types(value.dtype, torch.float32)
    # a row at a time: a float32 sum over all elements of a large tensor would lose digits
    rows = torch.linalg.vector_norm(value.detach(), dim=-1, dtype=work)
    return value.numel(), rows.double().square().sum()


def token_moments(weights: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return the number of tokens, and over them the means and the sums of squared deviations, float64.

    Args:
        weights: [..., S], detached.

    Returns:
        The count, and two tensors [S + 2]: of each weight, of the entropy -sum_s w_s ln(w_s), and of exp(entropy).
    """
    weights = weights.double().flatten(0, -2)
    entropy = torch.special.entr(weights).sum(-1, keepdim=True)
    variance, mean = torch.var_mean(torch.cat([weights, entropy, entropy.exp()], -1), 0, correction=0)
    return weights.shape[0], mean, variance * weights.shape[0]
