"""Compute the reads that share their finished sources in two phases, where that moves fewer bytes.

    h1 = read([x0, b1, p1], q1);  h2 = read([x0, b1, p2], q2)
    ->  (o1, o2), (l1, l2) = inter_block([x0, b1], [q1, q2]);  h1 = merge(o1, l1, p1, q1);  h2 = merge(o2, l2, p2, q2)

The finished sources are read once for all of them (arXiv 2603.15031, algorithm 1). Reads are grouped by their sources,
so a cast or a scale between two states, which makes other sources, ends a group.

A recency bias is on the newest source, so that is never a finished one that others share: the read at the end of a
block merges the sum of that block, too, and the bias is taken off the log-sum-exp of what it is merged with. Variants
with several heads or sliced keys stay direct.
"""

import operator
from collections.abc import Sequence

from torch import fx

from attnres_rewrite.config import Schedule
from attnres_rewrite.fxgraph import place_meta, tensor_of
from attnres_rewrite.kernels.inter_block.op import inter_block
from attnres_rewrite.kernels.merge.op import merge, with_recency_bias
from attnres_rewrite.kernels.read.op import block_attn_res
from attnres_rewrite.kernels.variant_read.op import variant_attn_res
from attnres_rewrite.passes.match_norm import Norm, match_norm
from attnres_rewrite.records import ReadGroup


def schedule_reads(graph: fx.Graph, schedule: Schedule) -> tuple[ReadGroup, ...]:
    """Schedule every read of a rewritten graph; "auto" takes, for each group, what moves fewer bytes."""
    found: dict[tuple[fx.Node, ...], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target in (block_attn_res, variant_attn_res):
            found.setdefault(_finished(node), []).append(node)
    groups = tuple(_group(finished, reads, schedule) for finished, reads in found.items())
    for group, reads in zip(groups, found.values(), strict=True):
        if group.schedule == "two_phase":
            _split(graph, reads)
    graph.lint()
    return groups


def _finished(read: fx.Node) -> tuple[fx.Node, ...]:
    if _bias(read) and "only_direct" not in read.meta:
        return tuple(_sources(read)[:-1])
    return tuple(_sources(read)[: read.meta["num_finished"]])


def _bias(read: fx.Node) -> float:
    bias = read.kwargs.get("recency_bias", 0.0)
    assert isinstance(bias, float)
    return bias


def _sources(read: fx.Node) -> Sequence[fx.Node]:
    sources = read.args[0]
    assert isinstance(sources, list | tuple)
    return sources  # type: ignore[return-value]


def _group(finished: Sequence[fx.Node], reads: Sequence[fx.Node], schedule: Schedule) -> ReadGroup:
    value = tensor_of(reads[0])
    assert value is not None
    row_bytes = value.shape[-1] * value.element_size()
    merges = [read for read in reads if len(_sources(read)) > len(finished)]
    fused = sum(isinstance(match_norm(read), Norm) for read in merges)
    counts = len(finished), len(reads), len(merges)
    direct, two_phase = row_bytes * direct_rows(*counts), row_bytes * two_phase_rows(*counts, fused)
    chosen = schedule if schedule != "auto" else "two_phase" if two_phase < direct else "direct"
    if "only_direct" in reads[0].meta:
        chosen = "direct"
    names = tuple(read.meta["attn_res"] for read in reads)
    return ReadGroup(names, len(finished), len(merges), chosen, direct, two_phase)


def direct_rows(num_finished: int, num_reads: int, num_merges: int) -> int:
    """Count the rows of D that a token moves around the direct reads of a group, forward and backward.

    A read of S sources reads them and writes the mix, S + 1. Its backward reads them and one gradient and writes S
    gradients, 2S + 1, each of which autograd then adds to the sum so far, 3S. With the add before it, 3, and the norm
    after it, 2 and 3.
    """
    own = (num_reads - num_merges) * (6 * num_finished + 2)
    return own + num_merges * (6 * (num_finished + 1) + 2 + 3 + 5)


def two_phase_rows(num_finished: int, num_reads: int, num_merges: int, num_fused: int) -> int:
    """Count the rows of D that a token moves around one group in two phases, forward and backward.

    Phase 1 reads its N sources twice, for the logits and for the mixes, and writes Q mixes: 2N + Q; the backward makes
    the mixes again, N + Q, reads their gradients and the sources twice and writes N gradients, 2Q + 3N, which are
    added to the sums so far, 3N. With one source the mix is the source: it is read once, nothing is written or made
    again, and the Q gradients are added up, 3Q, before those of the logits, 5.

    A merge in one pass with its add and norm moves 5 and 6. On its own it reads two rows and writes one, its backward
    reads three and writes two, one of which is added, 3; with the add 3 and the norm 5.
    """
    phase_1 = 9 * num_finished + 4 * num_reads if num_finished > 1 else 6 + 3 * num_reads
    return phase_1 + 11 * num_fused + 19 * (num_merges - num_fused)


def _split(graph: fx.Graph, reads: Sequence[fx.Node]) -> None:
    """Replace the reads of a group by phase 1, before the first of them, and a merge at each."""
    # asked for anew: a source may be a read of another group, replaced by now
    finished = _finished(reads[0])
    with graph.inserting_before(reads[0]):
        queries = [_again(graph, read.args[1]) for read in reads]
        gains = [_again(graph, read.kwargs["key_norm"]) for read in reads]
        key_norms = None if gains[0] is None else gains
        factors = [_factor(read) if _is_finished(read, finished) else 1.0 for read in reads]
        options = {"key_norms": key_norms, "eps": reads[0].kwargs["eps"], "factors": factors}
        inter = graph.call_function(inter_block, (list(finished), queries), options)
        inter.meta = place_meta(reads[0])
        outs, lses = (graph.call_function(operator.getitem, (inter, index)) for index in range(2))
    for position, read in enumerate(reads):
        with graph.inserting_before(read):
            mix = graph.call_function(operator.getitem, (outs, position))
            if not _is_finished(read, finished):
                lse = graph.call_function(operator.getitem, (lses, position))
                if _bias(read):
                    lse = graph.call_function(with_recency_bias, (lse,), {"recency_bias": _bias(read)})
                options = {"key_norm": gains[position], "eps": read.kwargs["eps"], "factor": _factor(read)}
                mix = graph.call_function(merge, (mix, lse, _sources(read)[-1], queries[position]), options)
        mix.meta = dict(read.meta)
        read.replace_all_uses_with(mix)
    for read in reads:
        parameters = [node for node in (read.args[1], read.kwargs["key_norm"]) if isinstance(node, fx.Node)]
        graph.erase_node(read)
        for node in parameters:
            if not node.users:
                graph.erase_node(node)


def _is_finished(read: fx.Node, finished: Sequence[fx.Node]) -> bool:
    """Say whether phase 1 is all of a read: nothing is merged into its mix."""
    return len(_sources(read)) == len(finished)


def _factor(read: fx.Node) -> float:
    return float(len(_sources(read))) if read.kwargs["output"] == "sum" else 1.0


def _again(graph: fx.Graph, node: object) -> fx.Node | None:
    """Read a parameter where phase 1 needs it, which is before its own read."""
    if not isinstance(node, fx.Node):
        return None
    copy = graph.node_copy(node)
    copy.meta = dict(node.meta)
    return copy
