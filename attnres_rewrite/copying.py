"""Copy a graph with its plans, so that one copy can be rewritten and the other kept to compare with."""

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from attnres_rewrite.records import BlockPlan, Update


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Return a copy with the same nodes, names, metadata and calling convention, and the map from old to new."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = new.node_copy(node, lambda old: copies[old])
        copies[node].meta = dict(node.meta)
    new._codegen = graph._codegen
    return new, copies


def map_plan(plan: BlockPlan, copies: Mapping[fx.Node, fx.Node]) -> BlockPlan:
    """Return the plan on the nodes of a copied graph."""
    stream = replace(
        plan.stream,
        root=copies[plan.stream.root],
        updates=tuple(_map_update(update, copies) for update in plan.stream.updates),
        readers=tuple(tuple(copies[reader] for reader in readers) for readers in plan.stream.readers),
    )
    return replace(plan, stream=stream)


def _map_update(update: Update, copies: Mapping[fx.Node, fx.Node]) -> Update:
    return replace(
        update,
        add=copies[update.add],
        stream=copies[update.stream],
        carriers=tuple(copies[carrier] for carrier in update.carriers),
    )
