"""Let the readers of a stream view what a read makes, however it is laid out in memory.

    x = x.permute(1, 0, 2) + f(x);  y = x.transpose(0, 1).view(-1, D)   ->   y = x.transpose(0, 1).reshape(-1, D)

The sum of permuted tensors is permuted too, and torch.export leaves out a contiguous() that copies nothing; a read has
a layout of its own. Where a view is possible, reshape is that view: every value stays.

Does not handle: views of memory that something writes into, which have to stay views.
"""

from collections.abc import Sequence

import torch
from torch import fx

from attnres_rewrite.fxgraph import tensor_of, written_inputs
from attnres_rewrite.passes.normalize_adds import SharedMemory
from attnres_rewrite.records import ResidualStream

_RESHAPES = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten.view_as.default: torch.ops.aten.reshape_as.default,
}


def relax_views(graph: fx.Graph, streams: Sequence[ResidualStream]) -> None:
    """Turn the views behind every state that is not contiguous into reshapes; code is not generated anew."""
    behind = {state for stream in streams for state in stream.states[1:] if _is_laid_out_otherwise(state)}
    if not behind:
        return
    nodes = list(graph.nodes)
    memory = SharedMemory(nodes)
    written = {id(memory.group_of[target]) for node in nodes for target in written_inputs(node)}
    for node in nodes:
        if any(source in behind for source in node.all_input_nodes):
            behind.add(node)
            if node.target in _RESHAPES and id(memory.group_of[node]) not in written:
                node.target = _RESHAPES[node.target]


def _is_laid_out_otherwise(state: fx.Node) -> bool:
    value = tensor_of(state)
    return value is not None and not value.is_contiguous()
