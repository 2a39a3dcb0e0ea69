"""Write one mode of a rewritten model as JSON, its graphs and its plans, and read it back.

A plan refers to the nodes of the original graph by name.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from attnres_rewrite.graph_json import graph_from_json, graph_to_json
from attnres_rewrite.module import Program
from attnres_rewrite.records import BlockPlan, ReadPlan, ResidualStream, Update


def program_to_json(program: Program) -> Any:
    return {
        "graph": graph_to_json(program.graph),
        "original": graph_to_json(program.original),
        "plans": [_plan_to_json(plan) for plan in program.plans],
    }


def _plan_to_json(plan: BlockPlan) -> Any:
    stream = plan.stream
    return {
        "name": stream.name,
        "root": stream.root.name,
        "width": stream.width,
        "dtype": str(stream.dtype).removeprefix("torch."),
        "axes": list(stream.axes),
        "readers": [[reader.name for reader in readers] for readers in stream.readers],
        "scale_culprits": list(stream.scale_culprits),
        "updates": [
            {
                "add": update.add.name,
                "stream": update.stream.name,
                "branch_position": update.branch_position,
                "kind": update.kind,
                "carriers": [carrier.name for carrier in update.carriers],
            }
            for update in stream.updates
        ],
        "blocks": [[block.start, block.stop] for block in plan.blocks],
        "reads": [[read.state, read.owner, read.source_line, read.num_sources, read.name] for read in plan.reads],
    }


def program_from_json(data: Any) -> Program:
    graph, _ = graph_from_json(data["graph"])
    original, nodes = graph_from_json(data["original"])
    return Program(graph, original, tuple(_plan_from_json(plan, nodes) for plan in data["plans"]))


def _plan_from_json(data: Any, nodes: Mapping[str, fx.Node]) -> BlockPlan:
    updates = tuple(
        Update(
            nodes[update["add"]],
            nodes[update["stream"]],
            update["branch_position"],
            update["kind"],
            tuple(nodes[name] for name in update["carriers"]),
        )
        for update in data["updates"]
    )
    stream = ResidualStream(
        data["name"],
        nodes[data["root"]],
        updates,
        data["width"],
        getattr(torch, data["dtype"]),
        tuple(data["axes"]),
        tuple(tuple(nodes[name] for name in readers) for readers in data["readers"]),
        tuple(data["scale_culprits"]),
    )
    blocks = tuple(range(*block) for block in data["blocks"])
    return BlockPlan(stream, blocks, tuple(ReadPlan(*read) for read in data["reads"]))
