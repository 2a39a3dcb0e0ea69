"""Do the add before a merge, the merge, and the norm after it in one pass over the rows.

    p' = p + f;  h = merge(o, l, p', q);  y = rms_norm(h, w)
    ->  p', y = add_merge_norm(p, f, o, l, q, w)

Only where the norm is all that reads the mix, and the new partial sum is not needed before it. The result is the same
to rounding: the mix is not rounded on its way into the norm. Left alone, with the reason: direct reads, mixes that
are phase-1 results, norms with other readers or of a form that match_norm does not know.
"""

import operator
from collections.abc import Iterator

import torch
from torch import fx

from attnres_rewrite.fxgraph import shape_of, tensor_of
from attnres_rewrite.kernels.merge.op import add_merge_norm, merge
from attnres_rewrite.kernels.read.op import block_attn_res
from attnres_rewrite.kernels.variant_read.op import variant_attn_res
from attnres_rewrite.passes.match_norm import Norm, match_norm
from attnres_rewrite.passes.normalize_adds import ADD
from attnres_rewrite.records import FusedRead

_METADATA_CHECK = torch.ops.aten._assert_tensor_metadata.default


def fuse_reads(graph: fx.Graph) -> tuple[FusedRead, ...]:
    """Fuse every merge of a scheduled graph with its neighbours; return what became of each read."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    fused = tuple(_fuse(graph, node, order) for node in list(graph.nodes) if _is_mix(node))
    graph.lint()
    return fused


def _is_mix(node: fx.Node) -> bool:
    return "num_finished" in node.meta


def _fuse(graph: fx.Graph, mix: fx.Node, order: dict[fx.Node, int]) -> FusedRead:
    name = mix.meta["attn_res"]
    if mix.target is not merge:
        return FusedRead(name, (), _why_no_merge(mix))
    norm = match_norm(mix)
    if isinstance(norm, str):
        return FusedRead(name, (), norm)
    added, reason = _add_before(mix, order)
    _replace(graph, mix, added, norm)
    neighbours = ("add",) * (added is not None) + (f"{norm.kind} norm",)
    return FusedRead(name, neighbours, reason)


def _why_no_merge(mix: fx.Node) -> str:
    if mix.target not in (block_attn_res, variant_attn_res):
        return "its block is finished: phase 1 is the mix"
    only_direct = mix.meta.get("only_direct")
    return f"it is a direct read: {only_direct} has no two-phase form" if only_direct else "it is a direct read"


def _add_before(mix: fx.Node, order: dict[fx.Node, int]) -> tuple[fx.Node | None, str]:
    """Return the add that makes the partial sum of a merge, or why it must stay where it is."""
    partial = mix.args[2]
    assert isinstance(partial, fx.Node)
    if partial.target is not ADD:
        return None, "the partial sum is the first update of its block"
    operands = [tensor_of(operand) for operand in partial.args]
    value = tensor_of(partial)
    if any(operand is None or value is None or operand.dtype != value.dtype for operand in operands):
        return None, "the add before it changes the dtype"
    if any(shape_of(operand) != shape_of(partial) for operand in partial.args) or partial.kwargs:
        return None, "the add before it broadcasts"
    if any(order.get(user, order[mix]) < order[mix] for user in partial.users):
        return None, "the partial sum is needed before the read"
    return partial, ""


def _replace(graph: fx.Graph, mix: fx.Node, added: fx.Node | None, norm: Norm) -> None:
    inter_out, lse, partial, query = mix.args
    before, update = added.args if added is not None else (partial, None)
    with graph.inserting_before(mix):
        weight, bias = (_copied(graph, node) for node in (norm.weight, norm.bias))
        both = graph.call_function(
            add_merge_norm,
            (before, update, inter_out, lse, query, mix.kwargs["key_norm"], weight, bias),
            {
                "norm_eps": norm.eps,
                "eps": mix.kwargs["eps"],
                "factor": mix.kwargs["factor"],
                "norm": norm.kind,
            },
        )
        both.meta = {key: value for key, value in mix.meta.items() if key != "val"}
        total, normed = (graph.call_function(operator.getitem, (both, index)) for index in range(2))
    normed.meta = dict(norm.end.meta)
    norm.end.replace_all_uses_with(normed)
    _erase_unread(graph, norm.end)
    if added is not None and added.users:
        total.meta = dict(added.meta)
        added.replace_all_uses_with(total)
        graph.erase_node(added)
    else:
        graph.erase_node(total)


def _copied(graph: fx.Graph, node: fx.Node | None) -> fx.Node | None:
    """Work out a value made of parameters once more, here."""
    if node is None:
        return None
    copies: dict[fx.Node, fx.Node] = {}
    for inner in _cone(node):
        copies[inner] = graph.node_copy(inner, lambda old: copies[old])
        copies[inner].meta = dict(inner.meta)
    return copies[node]


def _cone(node: fx.Node) -> Iterator[fx.Node]:
    for inner in node.all_input_nodes:
        yield from _cone(inner)
    yield node


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nobody reads, and what only it read."""
    if node._erased:
        return
    for user in list(node.users):
        if user.target is _METADATA_CHECK:
            graph.erase_node(user)
    if node.users or node.op == "placeholder":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for inner in inputs:
        _erase_unread(graph, inner)
