"""Find the adds that a forward makes under no_grad, autocast or torch.cond: torch.export keeps a region as one call.

    with torch.autocast("cpu", torch.bfloat16): x = layer(x)
    ->  x = wrap_with_autocast("cpu", torch.bfloat16, True, None, body, x)[0]

    x = torch.cond(p, layer, torch.clone, (x,))   ->   x = cond(p, body, other_body, (x, *parameters))[0]

The passes do not look into bodies. A stream that goes through one is refused, because the layers in it would be left
out; one that has nothing to do with a stream outside (a frozen encoder) is left alone, and said so in the report.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnres_rewrite.copying import copy_graph
from attnres_rewrite.errors import StreamRegionError, explain
from attnres_rewrite.fxgraph import owner_of, place_of, source_line
from attnres_rewrite.passes.carriers import stream_root
from attnres_rewrite.passes.chains import Chain, classify_adds, link_chains
from attnres_rewrite.passes.normalize_adds import normalize_adds
from attnres_rewrite.passes.reachability import Reachability
from attnres_rewrite.records import LeftAlone, ResidualStream

_KINDS: dict[object, tuple[str, str]] = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: (
        "a change of the gradient mode",
        "To freeze layers, call requires_grad_(False) on their parameters instead.",
    ),
    torch.ops.higher_order.wrap_with_autocast: (
        "torch.autocast",
        "Enter autocast around the call of the model instead of in its forward.",
    ),
    torch.ops.higher_order.cond: (
        "torch.cond",
        "Choose in the branch: x + torch.cond(p, f, torch.zeros_like, (x,)), or x + torch.where(p, f(x), 0).",
    ),
}


@dataclass(frozen=True, slots=True)
class Region:
    """One call of a body that holds chains of adds; `operands` are what the body's placeholders stand for."""

    call: fx.Node
    operands: tuple[fx.Node, ...]
    body: fx.GraphModule
    chains: tuple[Chain, ...]


def find_regions(gm: fx.GraphModule) -> tuple[Region, ...]:
    """Return the regions of a graph that hold chains; the graph is not changed."""
    return tuple(region for region in _regions(gm) if region.chains)


def refuse_cut_streams(regions: Sequence[Region], streams: Sequence[ResidualStream]) -> None:
    """Raise StreamRegionError for a region that a stream goes through; without streams, for any that holds one."""
    for region in regions:
        for chain in region.chains:
            alone = not streams and len(chain.adds) > 1
            if alone or any(_is_of(chain, region, stream) for stream in streams):
                kind, remedy = _KINDS[region.call.target]
                raise StreamRegionError(
                    explain(
                        f"the stream goes through {kind}",
                        place_of(chain.states[1]),
                        f"torch.export keeps what is under it as one call, so {len(chain.adds)} of its adds would be "
                        "left out.",
                        remedy,
                    )
                )


def adds_in(regions: Sequence[Region]) -> Iterator[LeftAlone]:
    """Yield the adds in regions that no stream goes through."""
    for region in regions:
        reason = f"lies under {_KINDS[region.call.target][0]}, which the capture keeps as one call"
        for add in (add.node for chain in region.chains for add in chain.adds):
            yield LeftAlone(add.name, source_line(add), owner_of(add), reason)


def _regions(gm: fx.GraphModule) -> Iterator[Region]:
    for node in gm.graph.nodes:
        if node.target in _KINDS:
            bodies, operands = _bodies_and_operands(node)
            for kept in (gm.get_submodule(str(body.target)) for body in bodies):
                assert isinstance(kept, fx.GraphModule)
                body = fx.GraphModule(kept, copy_graph(kept.graph)[0])
                normalize_adds(body)
                reach = Reachability(body.graph)
                chains = tuple(link_chains(classify_adds(reach), reach))
                yield Region(node, operands, body, chains)


def _bodies_and_operands(call: fx.Node) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if call.target is torch.ops.higher_order.cond:
        _, true_body, false_body, operands = call.args
        return (true_body, false_body), tuple(operands)  # type: ignore[arg-type]
    position = next(i for i, arg in enumerate(call.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
    return (call.args[position],), call.args[position + 1 :]


def _is_of(chain: Chain, region: Region, stream: ResidualStream) -> bool:
    """Say whether a stream goes on from a chain of the body, or ends in one."""
    inputs = dict(zip(region.body.graph.find_nodes(op="placeholder"), region.operands, strict=True))
    results: Any = next(iter(region.body.graph.find_nodes(op="output"))).args[0]
    ends = [index for index, result in enumerate(results) if stream_root(result) is chain.end]
    root = stream.root
    from_call = root.target is operator.getitem and root.args[0] is region.call and root.args[1] in ends
    return from_call or (bool(ends) and stream_root(inputs.get(chain.root, chain.root)) in stream.states)
