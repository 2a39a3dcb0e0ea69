"""Refuse a stream that gradients flow through only in part, because the forward turns them off on the way.

    with torch.no_grad(): x1 = x0 + f(x0)
    x2 = x1 + g(x1)                          the original gives x0 no gradient; a read of x2 mixes x0 and would

Every add of a stream, and everything that reads one of its states, has to run in one gradient mode: the reads are
computed beside the adds, some of them together. What else is done under no_grad (rotary tables, masks) is left alone.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from attnres_rewrite.errors import StreamRegionError, explain
from attnres_rewrite.fxgraph import place_of
from attnres_rewrite.records import ResidualStream


def refuse_mixed_grad_modes(graph: fx.Graph, streams: Sequence[ResidualStream]) -> None:
    """Raise StreamRegionError for a stream in more than one gradient mode; the graph is not changed."""
    modes = dict(_grad_modes(graph))
    for stream in streams:
        wanted = modes[stream.updates[0].add]
        for node in _adds_and_readers(stream):
            if modes[node] != wanted:
                off, on = (stream.updates[0].add, node) if modes[node] else (node, stream.updates[0].add)
                raise StreamRegionError(
                    explain(
                        f"gradients are off for a part of {stream.name}",
                        place_of(off),
                        f"They are on at {place_of(on)}. A read mixes what came before it, and would carry gradients "
                        "past the place where the model stops them.",
                        "To freeze layers, call requires_grad_(False) on their parameters instead.",
                    )
                )


def _adds_and_readers(stream: ResidualStream) -> Iterator[fx.Node]:
    yield from (update.add for update in stream.updates)
    # the root keeps its readers
    for readers in stream.readers[1:]:
        yield from (reader for reader in readers if reader.op != "output")


def _grad_modes(graph: fx.Graph) -> Iterator[tuple[fx.Node, bool]]:
    """Say of every node whether gradients are on; at first they are as for whoever traces the graph."""
    mode = torch.is_grad_enabled()
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            mode = bool(node.args[0])
        yield node, mode
