"""Which values of a graph share memory, and who writes into it.

    m = zeros(4); v = m[0]; v.fill_(1)     ->     m, v and what fill_ returns are one piece; fill_ writes

A captured graph is not functional: a value that is written into means something else behind the write. Whoever moves or
repeats a node has to know.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from attnres_rewrite.fxgraph import aliased_inputs, written_inputs


@dataclass(frozen=True, slots=True)
class Memory:
    """The pieces of memory of a graph. A piece is named by one of its nodes."""

    piece_of: Mapping[fx.Node, fx.Node]
    members: Mapping[fx.Node, tuple[fx.Node, ...]]  # of each piece that is written into, in the order of the graph
    writers: Mapping[fx.Node, tuple[fx.Node, ...]]  # of each piece that is written into, in the order of the graph

    def writers_of(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes that write into the memory of `node`."""
        return self.writers.get(self.piece_of[node], ())


def share_memory(nodes: Iterable[fx.Node], written: Callable[[fx.Node], Sequence[fx.Node]] = written_inputs) -> Memory:
    """Find the values that may share memory: what may be a view counts as one. `written` gives what a node writes."""
    parent: dict[fx.Node, fx.Node] = {}

    def piece(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    ordered = list(nodes)
    attributes: dict[object, fx.Node] = {}
    for node in ordered:
        parent[node] = attributes.setdefault(node.target, node) if node.op == "get_attr" else node
        for other in (*aliased_inputs(node), *written(node)):
            parent[piece(node)] = piece(other)
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in ordered:
        for target in written(node):
            writers.setdefault(piece(target), []).append(node)
    members: dict[fx.Node, list[fx.Node]] = {name: [] for name in writers}
    for node in ordered:
        if piece(node) in members:
            members[piece(node)].append(node)
    return Memory(
        {node: piece(node) for node in ordered},
        {name: tuple(found) for name, found in members.items()},
        {name: tuple(dict.fromkeys(found)) for name, found in writers.items()},
    )
