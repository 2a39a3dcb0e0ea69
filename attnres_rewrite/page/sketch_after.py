"""Draw one layer as it was rewritten, from the graph that runs.

x0, b1 -> phase 1;  phase 1, p -> read + norm -> attention -> add + read + norm -> mlp -> add -> the read behind it
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from attnres_rewrite.fxgraph import op_name
from attnres_rewrite.kernels.inter_block.op import inter_block
from attnres_rewrite.kernels.merge.op import add_merge_norm, merge, with_recency_bias
from attnres_rewrite.kernels.read.op import block_attn_res
from attnres_rewrite.kernels.variant_read.op import variant_attn_res
from attnres_rewrite.module import Program
from attnres_rewrite.page.choose_layer import Layer, reads_of
from attnres_rewrite.page.sketch import Box, Operand, Sketch, Special, between, is_total, origin, sketch
from attnres_rewrite.page.sketch_before import module_names, numbered
from attnres_rewrite.passes.carriers import is_parameter
from attnres_rewrite.records import BlockPlan, ReadPlan


def sketch_after(program: Program, plan: BlockPlan, layer: Layer) -> Sketch:
    """Draw the reads of a layer, the boxes between them, and the read behind it."""
    root = next(node for node in program.graph.nodes if node.name == plan.stream.root.name)
    reads = _reads_to_draw(program.graph, plan, layer, root)
    own = [read for read in reads if read.plan.state < layer.last]
    # state 0 has no read: what reads it reads the root
    start = own[0].mix if own and layer.first > 1 else root
    mixes = {read.mix for read in reads}
    phases = {read.phase for read in reads if read.phase is not None}
    wanted = {*between(program.graph, {start}, mixes), *mixes, *phases}
    specials = _adds(reads, plan, wanted, root) | _gated_adds(program.graph, reads, wanted, root)
    specials |= {read.phase: _phase_box(read.phase, read.finished) for read in reads if read.phase is not None}
    specials |= {read.mix: _read_box(read) for read in reads}
    window = [
        node
        for node in program.graph.nodes
        if node in wanted and node.target is not with_recency_bias and not _is_scale_of_source(node, specials, root)
    ]
    inputs = _inputs(reads, plan, specials.values(), wanted)
    if start is root and root not in inputs:
        inputs = {root: _root_box(), **inputs}
    return sketch(window, specials, inputs, module_names(program, plan, layer))


@dataclass(frozen=True, slots=True)
class _Read:
    """A read in the graph: `mix` is its result, `phase` the phase 1 it takes part in, `partial` the open source."""

    plan: ReadPlan
    mix: fx.Node
    phase: fx.Node | None
    finished: tuple[fx.Node, ...]
    partial: fx.Node | None
    update: fx.Node | None  # what is added to `partial` in the same pass


def _reads_to_draw(graph: fx.Graph, plan: BlockPlan, layer: Layer, root: fx.Node) -> list[_Read]:
    """Return the layer's own reads, or the last before them where it has none, and the first behind it."""
    mixes = {node.meta["attn_res"]: node for node in graph.nodes if "attn_res" in node.meta}
    before = [read for read in plan.reads if read.state < layer.last]
    behind = [read for read in plan.reads if read.state >= layer.last]
    own = reads_of(plan, layer) or before[-1:]
    return [_find(mixes[read.name], read, plan, root) for read in (*own, *behind[:1])]


def _find(mix: fx.Node, read: ReadPlan, plan: BlockPlan, root: fx.Node) -> _Read:
    phase, partial, update = None, None, None
    if mix.target in (block_attn_res, variant_attn_res):
        sources = _nodes(mix.args[0])
        # the last state of a block has it finished, so its read mixes no partial sum
        if all(block.stop - 1 != read.state for block in plan.blocks):
            *sources, partial = sources
    else:
        phase = _phase_of(mix)
        sources = _nodes(phase.args[0])
    if mix.target is merge:
        partial = _node(mix.args[2])
    if mix.target is add_merge_norm:
        partial = _node(mix.args[0])
        update = mix.args[1] if isinstance(mix.args[1], fx.Node) else None
    finished = tuple(_source(node, root) for node in sources)
    return _Read(read, mix, phase, finished, None if partial is None else _source(partial, root), update)


def _source(node: fx.Node, root: fx.Node) -> fx.Node:
    """Look through what is done to each source alone, but for the cast that begins a block: it makes the source."""
    while node is not root and op_name(node) != "type_as":
        scaled = _scaled(node)
        if scaled is None and not _has_new_form(node):
            break
        node = scaled or node.all_input_nodes[0]
    return node


def _scaled(node: fx.Node) -> fx.Node | None:
    """Return what a node multiplies by a number, a parameter or a buffer, or None when it does something else."""
    if op_name(node) not in ("mul", "div", "neg"):
        return None
    values = [entry for entry in node.all_input_nodes if not is_parameter(entry)]
    return values[0] if len(values) == 1 else None


def _has_new_form(node: fx.Node) -> bool:
    return not is_total(node) and origin(node) is not node


def _is_scale_of_source(node: fx.Node, specials: Mapping[fx.Node, Special], root: fx.Node) -> bool:
    """Say whether a node scales a source: its readers are other such nodes, and what mixes sources."""
    if node in specials or _scaled(node) is None:
        return False
    drawn = {operand.node for special in specials.values() for operand in special.operands}
    return _source(node, root) in drawn and node not in drawn


def _phase_of(value: object) -> fx.Node:
    """Go from a read, or a mix of phase 1, times the number of sources or not, up to phase 1 itself."""
    node = _node(value)
    while node.target is not inter_block:
        node = _node(node.args[2 if node.target is add_merge_norm else 0])
    return node


def _node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def _nodes(values: object) -> tuple[fx.Node, ...]:
    assert isinstance(values, Sequence)
    return tuple(_node(value) for value in values)


def _phase_box(phase: fx.Node, finished: Sequence[fx.Node]) -> Special:
    queries = _nodes(phase.args[1])
    note = f"{_many(len(queries), 'read')}, {_many(len(finished), 'finished source')}"
    return Special(Box("phase", "phase 1", note, "mix"), _sources(finished))


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _sources(finished: Sequence[fx.Node]) -> tuple[Operand, ...]:
    return tuple(Operand(node, "block" if index else "root") for index, node in enumerate(finished))


def _read_box(read: _Read) -> Special:
    partial = (Operand(read.partial, "partial"),) if read.partial is not None else ()
    added = (Operand(read.update),) if read.update is not None else ()
    mixed = (Operand(read.phase, "mix"),) if read.phase is not None else _sources(read.finished)
    title = f"read of {numbered('x', read.plan.state)}"
    return Special(Box("read", title, _how(read)), (*mixed, *partial, *added))


def _how(read: _Read) -> str:
    if read.mix.target in (block_attn_res, variant_attn_res):
        return f"softmax over {_many(read.plan.num_sources, 'source')}"
    if read.mix.target is merge:
        return "merges phase 1 and the partial sum"
    if read.mix.target is add_merge_norm:
        norm = f"{read.mix.kwargs['norm']} norm"
        return f"in one pass with add and {norm}" if read.update is not None else f"in one pass with {norm}"
    return "the mix of phase 1, as it is"


def _adds(reads: Iterable[_Read], plan: BlockPlan, window: set[fx.Node], root: fx.Node) -> dict[fx.Node, Special]:
    """Find the adds that make the partial sums and the blocks the reads mix, and those before them."""
    found: dict[fx.Node, Special] = {}
    for read in reads:
        made: list[tuple[fx.Node, int]] = [
            (node, block.stop - 1) for node, block in zip(read.finished[1:], plan.blocks, strict=False)
        ]
        if read.partial is not None:
            made.append((read.partial, read.plan.state - (read.update is not None)))
        for add, update in made:
            while add in window and op_name(add) == "add":
                before, added = _source(_node(add.args[0]), root), _node(add.args[1])
                box = Box("add", "add", _add_note(plan, update), "partial")
                found[add] = Special(box, (Operand(before, "partial"), Operand(added)))
                add, update = before, update - 1
    return found


def _gated_adds(graph: fx.Graph, reads: Iterable[_Read], window: set[fx.Node], root: fx.Node) -> dict[fx.Node, Special]:
    """Find the adds of the running sum, which gates keep, and those that a gated mix joins it with."""
    joined = {node.meta["gate_of"]: node for node in graph.nodes if "gate_of" in node.meta and op_name(node) == "add"}
    found: dict[fx.Node, Special] = {}
    for read in reads:
        if joined.get(read.plan.name) not in window:
            continue
        total, product = _nodes(joined[read.plan.name].args)
        box = Box("add", "add", "the gated mix joins the running sum", "stream")
        found[joined[read.plan.name]] = Special(box, (Operand(_source(total, root), "stream"), Operand(product)))
        add, state = _source(total, root), read.plan.state
        while add in window and op_name(add) == "add":
            before, added = _source(_node(add.args[0]), root), _node(add.args[1])
            note = f"{numbered('x', state)} = {numbered('x', state - 1)} + {numbered('u', state)}"
            found[add] = Special(Box("add", "add", note, "stream"), (Operand(before, "stream"), Operand(added)))
            add, state = before, state - 1
    return found


def _add_note(plan: BlockPlan, update: int) -> str:
    number = next(number for number, block in enumerate(plan.blocks, start=1) if update in block)
    finishes = update == plan.blocks[number - 1].stop - 1
    return f"{numbered('u', update)} {'completes' if finishes else 'joins'} block {number}"


def _inputs(
    reads: Iterable[_Read], plan: BlockPlan, specials: Iterable[Special], window: set[fx.Node]
) -> dict[fx.Node, Box]:
    """Return the values that come from outside, the root first, then blocks, the partial sum, updates."""
    labels: dict[fx.Node, Box] = {}
    for read in reads:
        labels |= _labels(read, plan)
    operands = [operand for special in specials for operand in special.operands]
    sums = dict.fromkeys(origin(operand.node) for operand in operands if operand.tint == "stream")
    so_far = Box("input", "x", "the running sum so far", "stream")
    labels |= {node: so_far for node in sums if node not in labels}
    used = dict.fromkeys(origin(operand.node) for operand in operands)
    outside = [node for node in used if node not in window]
    known = [node for node in labels if node in outside]
    rest = [node for node in outside if node not in labels]
    return {node: labels[node] for node in known} | {node: Box("input", "update", "from before") for node in rest}


def _labels(read: _Read, plan: BlockPlan) -> Mapping[fx.Node, Box]:
    labels = {origin(read.finished[0]): _root_box()}
    for number, (node, block) in enumerate(zip(read.finished[1:], plan.blocks, strict=False), start=1):
        note = f"block {number}: {_span(block.start, block.stop - 1)}"
        labels[origin(node)] = Box("input", numbered("b", number), note, "block")
    state = read.plan.state
    if read.partial is not None:
        last = state - (read.update is not None)
        number, block = next((n, block) for n, block in enumerate(plan.blocks, start=1) if last in block)
        labels[origin(read.partial)] = Box(
            "input", "p", f"block {number} so far: {_span(block.start, last)}", "partial"
        )
    if read.update is not None:
        labels[origin(read.update)] = Box("input", numbered("u", state), f"update {state}")
    return labels


def _root_box() -> Box:
    return Box("input", numbered("x", 0), "the root", "root")


def _span(first: int, last: int) -> str:
    return f"update {first}" if first == last else f"updates {first} to {last}"
