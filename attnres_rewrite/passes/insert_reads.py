"""Replace every state of a stream by its read.

    x1 = x0 + f1;  x2 = x1 + f2;  y = g(x2)                          one block of two updates
    ->  part = f1;  h1 = read([x0, part]);  part' = part + f2;  h2 = read([x0, part']);  y = g(h2)

Sources run beside the original nodes: each carrier of the stream is applied to each of them. The original
adds die; their consumers read the mix. Nothing else moves, so random numbers are drawn in the same order.

With a gate the running sum goes on beside the sources, bit for bit the original, and a read is added to it:

    ->  ...  h2 = x2 + gate * read([x0, part'])
"""

from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.fx.node import Argument

from attnres_rewrite.config import START_VALUES, AttnResConfig
from attnres_rewrite.errors import AlreadyRewrittenError
from attnres_rewrite.fxgraph import op_name, place_meta, shape_of, tensor_of
from attnres_rewrite.kernels.read.op import block_attn_res
from attnres_rewrite.kernels.variant_read.op import variant_attn_res
from attnres_rewrite.passes.carriers import CASTS, carried_input
from attnres_rewrite.passes.normalize_adds import ADD
from attnres_rewrite.records import BlockPlan, ReadPlan, ResidualStream, Update

aten = torch.ops.aten


def insert_reads(graph: fx.Graph, plans: Sequence[BlockPlan], config: AttnResConfig) -> None:
    """Rewrite the streams in a graph.

    `add_parameters` must have made the queries and gains on the module that owns it, if one does.
    """
    mixes: dict[fx.Node, fx.Node] = {}
    for plan in plans:
        _rewrite_stream(graph, plan, config, mixes)
    graph.lint()


def add_parameters(root: nn.Module, plans: Sequence[BlockPlan], config: AttnResConfig) -> None:
    """Give every planned read its query (zeros), gain (ones) and gate (zeros), under the owner module.

    They are vectors, [D] but for sliced keys, and are made on the device of the stream.

    Raises:
        AlreadyRewrittenError: The owner has something named attn_res already.
    """
    refuse_taken_names(root, plans)
    for plan in plans:
        dtype = _parameter_dtype(plan.stream, config)
        root_value = tensor_of(plan.stream.root)
        assert root_value is not None
        sizes, device = config.parameter_sizes(plan.stream.width), root_value.device
        for read in plan.reads:
            holder = _submodule(root, read.name)
            for name, size in sizes.items():
                start = torch.full((size,), START_VALUES[name], dtype=dtype, device=device)
                setattr(holder, name, nn.Parameter(start))


def _parameter_dtype(stream: ResidualStream, config: AttnResConfig) -> torch.dtype:
    return config.param_dtype or torch.promote_types(stream.dtype, torch.float32)


def refuse_taken_names(root: nn.Module, plans: Sequence[BlockPlan]) -> None:
    """Raise AlreadyRewrittenError when a module that reads has something named attn_res, of whatever kind."""
    modules = dict(root.named_modules(remove_duplicate=False))
    for owner in {read.owner for plan in plans for read in plan.reads}:
        if owner in modules and hasattr(modules[owner], "attn_res"):
            name = f"{owner}.attn_res".lstrip(".")
            raise AlreadyRewrittenError(f"the model has something named {name} already; is it rewritten?")


def _submodule(root: nn.Module, name: str) -> nn.Module:
    """Return the submodule of this name, making modules that do nothing on the way where there are none.

    They can be called, too: an nn.Sequential calls every child it has.
    """
    module = root
    for part in name.split("."):
        child = module._modules.get(part)
        if child is None:
            child = nn.Identity()
            child.training = root.training
            module.add_module(part, child)
        module = child
    return module


def _rewrite_stream(graph: fx.Graph, plan: BlockPlan, config: AttnResConfig, mixes: dict[fx.Node, fx.Node]) -> None:
    """Rewrite one stream; `mixes` maps the states of those before it, one of which may be its root, to their reads."""
    stream = plan.stream
    reads = {read.state: read for read in plan.reads}
    starts = {block.start for block in plan.blocks}
    root = mixes.get(stream.root, stream.root)
    sources, total = [root], root
    moved: dict[tuple[fx.Node, int], fx.Node] = {}
    replaced: list[fx.Node] = []
    for state, update in enumerate(stream.updates, start=1):
        with graph.inserting_before(update.add):
            sources = [_carried(graph, source, update) for source in sources]
            added = _full_shape(graph, update, like=sources[0])
            if state in starts:
                # does nothing as captured; under autocast it keeps the partial sum in the precision of the stream
                sources.append(_call(graph, aten.type_as.default, (added, sources[0]), like=update.add))
            else:
                sources[-1] = _call(graph, ADD, (sources[-1], added), like=update.add)
            if config.gate:
                total = _call(graph, ADD, (_carried(graph, total, update), added), like=update.add)
            # a state that nobody reads may still be asked for its shape
            mix = total if config.gate else sources[0]
            if state in reads:
                open_block = state + 1 not in starts and state < len(stream.updates)
                mix = _read(graph, sources, open_block, stream, reads[state], config, moved, like=update.add)
                if config.gate:
                    mix = _added_to(graph, total, mix)
            update.add.replace_all_uses_with(mix)
            mixes[update.add] = mix
        replaced += [*update.carriers, update.add]
    _erase_dead(graph, replaced)


def _carried(graph: fx.Graph, source: fx.Node, update: Update) -> fx.Node:
    """Apply the carriers of an update, and the promotion of its add, to one source."""
    for carrier in update.carriers:
        through = carried_input(carrier)
        if op_name(carrier) in CASTS and _same_layout(source, carrier):
            continue
        copy = graph.node_copy(carrier, lambda arg, via=through, to=source: to if arg is via else arg)
        if copy.target is aten.view.default:
            # the stream may have been laid out for it by a copy that no source needs
            copy.target = aten.reshape.default
        copy.meta = dict(carrier.meta)
        source = copy
    return _cast(graph, source, like=update.add)


def _same_layout(source: fx.Node, cast: fx.Node) -> bool:
    """Say whether a cast changes nothing for this source: clone and contiguous only copy."""
    before, after = tensor_of(source), tensor_of(cast)
    return before is not None and after is not None and (before.dtype, before.device) == (after.dtype, after.device)


def _full_shape(graph: fx.Graph, update: Update, like: fx.Node) -> fx.Node:
    """Return what the update adds, expanded and cast to the stream."""
    added = update.branch
    if shape_of(added) != shape_of(update.add):
        added = _call(graph, aten.expand_as.default, (added, like), like=update.add)
        branch = tensor_of(update.branch)
        assert branch is not None
        added.meta["val"] = branch.expand(tensor_of(update.add).shape)  # type: ignore[union-attr]
    return _cast(graph, added, like=update.add)


def _cast(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    value, wanted = tensor_of(node), tensor_of(like)
    assert value is not None
    assert wanted is not None
    if value.dtype == wanted.dtype:
        return node
    return _call(graph, aten.to.dtype, (node, wanted.dtype), like=like)


def _read(
    graph: fx.Graph,
    sources: Sequence[fx.Node],
    open_block: bool,
    stream: ResidualStream,
    read: ReadPlan,
    config: AttnResConfig,
    moved: dict[tuple[fx.Node, int], fx.Node],
    like: fx.Node,
) -> fx.Node:
    axis, rank = stream.axes[read.state], len(shape_of(like) or ())
    for source in sources:
        if (source, axis) not in moved:
            moved[source, axis] = _moved(graph, source, axis, rank - 1, like)
    mixed = [moved[source, axis] for source in sources]
    query = graph.get_attr(read.query_name)
    gain = graph.get_attr(f"{read.name}.key_norm") if config.key_norm else None
    mix = _call_read(graph, mixed, query, gain, config)
    for node in (query, gain, mix):
        if node is not None:
            node.meta = place_meta(like)
    value = tensor_of(like)
    assert value is not None
    mix.meta |= {
        "val": value.movedim(axis, -1),
        "attn_res": read.name,
        "num_finished": len(sources) - open_block,
        "from_node": like.meta.get("from_node", []),
    }
    if config.only_direct:
        mix.meta["only_direct"] = config.only_direct
    if config.gate:
        mix = _gated(graph, mix, read, _parameter_dtype(stream, config))
    back = _moved(graph, mix, rank - 1, axis, like)
    if back is mix or not value.is_contiguous():
        return back
    # a reader may view it as the model laid it out
    laid_out = _call(graph, aten.contiguous.default, (back,), like=like)
    laid_out.meta["val"] = value
    return laid_out


def _call_read(
    graph: fx.Graph, sources: list[fx.Node], query: fx.Node, gain: fx.Node | None, config: AttnResConfig
) -> fx.Node:
    """Call the read, or its variant where the config asks for one."""
    options: dict[str, Argument] = {
        "key_norm": gain,
        "eps": config.eps,
        "output": "mean" if config.gate else config.output,
    }
    if not (config.only_direct or config.recency_bias):
        return graph.call_function(block_attn_res, (sources, query), options)
    options |= {"num_heads": config.num_heads, "key_rank": config.key_rank, "recency_bias": float(config.recency_bias)}
    return graph.call_function(variant_attn_res, (sources, query), options)


def _gated(graph: fx.Graph, mix: fx.Node, read: ReadPlan, dtype: torch.dtype) -> fx.Node:
    """Multiply a mix [..., D] by its gate [D]."""
    gate = graph.get_attr(f"{read.name}.gate")
    gated = graph.call_function(aten.mul.Tensor, (mix, gate))
    value = tensor_of(mix)
    assert value is not None
    gate.meta = place_meta(mix)
    gated.meta = place_meta(mix) | {"val": value.to(torch.promote_types(value.dtype, dtype)), "gate_of": read.name}
    return gated


def _added_to(graph: fx.Graph, total: fx.Node, gated: fx.Node) -> fx.Node:
    """Add a gated mix to the running sum, in the wider dtype of the two, and cast the result once."""
    value, wide = tensor_of(total), tensor_of(gated)
    assert value is not None
    assert wide is not None
    added = _call(graph, ADD, (total, gated), like=total)
    added.meta |= {"val": value.to(wide.dtype), "gate_of": gated.meta.get("gate_of")}
    if value.dtype == wide.dtype:
        return added
    cast = _call(graph, aten.type_as.default, (added, total), like=total)
    cast.meta["gate_of"] = added.meta["gate_of"]
    return cast


def _moved(graph: fx.Graph, node: fx.Node, source: int, target: int, like: fx.Node) -> fx.Node:
    """Move one axis of a node; nothing to do when it is in place."""
    if source == target:
        return node
    moved = _call(graph, aten.movedim.int, (node, source, target), like=like)
    value = tensor_of(node)
    assert value is not None
    moved.meta["val"] = value.movedim(source, target)
    return moved


def _call(graph: fx.Graph, target: torch._ops.OpOverload, args: tuple[object, ...], like: fx.Node) -> fx.Node:
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta = dict(like.meta)
    return node


def _erase_dead(graph: fx.Graph, replaced: Sequence[fx.Node]) -> None:
    """Erase the original adds and carriers that nobody reads any more, the last first."""
    for node in reversed(replaced):
        for user in list(node.users):
            if op_name(user) == "_assert_tensor_metadata":
                graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)
