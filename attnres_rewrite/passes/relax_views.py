"""Let a graph view its values however they are laid out in memory.

    y = scaled_dot_product_attention(q, k, v).transpose(1, 2).view(B, T, D)   ->   ....reshape(B, T, D)

torch.export leaves out a contiguous() that copies nothing where it captures. A read has a layout of its own, though,
and attention one for each device, precision and backend. Where a view is possible, reshape is that view: every value
stays.

Does not handle: views of memory that something writes into, which have to stay views.
"""

import torch
from torch import fx

from attnres_rewrite.passes.bodies import all_written
from attnres_rewrite.passes.shared_memory import share_memory

_RESHAPES = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten.view_as.default: torch.ops.aten.reshape_as.default,
}


def relax_views(program: fx.GraphModule) -> None:
    """Turn the views of a graph into reshapes; code is not generated anew."""
    memory = share_memory(program.graph.nodes, lambda node: all_written(node, program))
    for node in program.graph.nodes:
        if node.target in _RESHAPES and not memory.writers_of(node):
            node.target = _RESHAPES[node.target]
