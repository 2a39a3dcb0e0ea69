"""A program whose nodes have no recorded values, as one that was loaded -> the same with shapes, dtypes and devices.

A capture records a fake tensor for every node, which passes ask for its shape. A saved rewrite does not keep them: the
original graph is run once on the example inputs, and what each node gave is noted, without its numbers.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnres_rewrite.baseline import own_values
from attnres_rewrite.copying import copy_graph, map_plan
from attnres_rewrite.fxgraph import tensor_of
from attnres_rewrite.inputs import flat_inputs
from attnres_rewrite.module import Program, RewrittenModule
from attnres_rewrite.passes.insert_reads import insert_reads


def program_with_values(new: RewrittenModule, training: bool | None = None) -> Program:
    """Return the program of a mode, None for that of `new`, in whose original graph every tensor has `meta["val"]`."""
    program = new.programs[new.training if training is None else training]
    if all(tensor_of(plan.stream.root) is not None for plan in program.plans):
        return program
    graph, copies = copy_graph(program.original)
    module = fx.GraphModule(own_values(new, graph), graph)
    inputs = flat_inputs(program.original, new.example_inputs.args, new.example_inputs.kwargs)
    inputs = pytree.tree_map_only(Tensor, lambda value: _moved_along(value, new, program), inputs)
    with torch.no_grad():
        _Noting(module, graph=graph).run(*inputs, enable_io_processing=False)
    return Program(program.graph, graph, tuple(map_plan(plan, copies) for plan in program.plans))


def unscheduled_graph(new: RewrittenModule, training: bool | None = None) -> fx.Graph:
    """Return the graph of a mode with its reads in it, none scheduled or fused, for passes that cut it first."""
    program = program_with_values(new, training)
    graph, copies = copy_graph(program.original)
    insert_reads(graph, [map_plan(plan, copies) for plan in program.plans], new.config)
    return graph


def _moved_along(value: Tensor, new: RewrittenModule, program: Program) -> Tensor:
    """Bring an example input to where new.to() has brought the network: its device, and its dtype where that tells."""
    plan = program.plans[0]
    query = new.get_parameter(plan.reads[0].query_name)
    made_in = new.config.param_dtype or torch.promote_types(plan.stream.dtype, torch.float32)
    is_cast = value.is_floating_point() and query.dtype != made_in
    return value.to(query.device, query.dtype if is_cast else value.dtype)


class _Noting(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and note what it gave as a tensor of that shape that takes no memory."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["val"] = torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)
        return value
