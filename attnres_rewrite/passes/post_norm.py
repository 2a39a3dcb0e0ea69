"""Tell where one chain's end becomes the next chain's root through an op that no source could go through by itself.

x = norm(x + f(x))     post-norm: the sum never runs on, so each chain holds a layer's updates only
x = relu(x + f(x))     the same for a ResNet
x = drop(x + f(x))     the same in train mode, where each dropout draws a mask of its own
x = (x + f(x)) * mask  the same for a mask of the tokens, a choice (where), a clamp, a detach
x = lerp(x, f(x), 0.1) the same for an update that is no add: lerp, addmm, baddbmm, index_add
"""

from collections.abc import Sequence

from torch import fx

from attnres_rewrite.fxgraph import op_name, owner_of, shape_of, source_line
from attnres_rewrite.passes.carriers import CASTS, DROPOUTS, VIEWS, carried_input
from attnres_rewrite.passes.chains import Chain

_NORM_OPS = frozenset(
    """layer_norm rms_norm native_layer_norm _fused_rms_norm group_norm batch_norm instance_norm mean var var_mean
    linalg_vector_norm""".split()
)
_AROUND_A_NORM = (
    CASTS | DROPOUTS | VIEWS | frozenset("pow square sqrt rsqrt reciprocal mul div add sub getitem clamp_min".split())
)
_ACTIVATIONS = frozenset("relu gelu silu tanh sigmoid leaky_relu hardtanh relu6 elu mish relu_ silu_".split())
# Which arguments of other ops go on in the result, each element at or near its own place.
_KEEPS_SUM = {
    name: positions
    for positions, names in {
        (0,): """neg abs detach clamp clamp_min clamp_max masked_fill masked_scatter nan_to_num roll flip addmm baddbmm
        addbmm addcdiv index_add index_copy index_put index_fill scatter scatter_add scatter_reduce slice_scatter
        select_scatter tanh sigmoid exp softplus sin cos pow square tril triu""",
        (0, 1): "add sub mul div rsub lerp maximum minimum fmod",
        (1, 2): "where",
    }.items()
    for name in names.split()
}
_UPDATES = frozenset("add sub rsub lerp addmm baddbmm addbmm addcdiv index_add scatter_add".split())
_MOST_UPDATES = 3  # attention, cross-attention, MLP: more updates between two norms make a stack, not a layer


def links(chains: Sequence[Chain]) -> dict[int, tuple[int, str]]:
    """Map a chain's index to the chain whose root is made from its end, and by what, e.g. "layer_norm"."""
    end_of = {chain.end: index for index, chain in enumerate(chains)}
    found: dict[int, tuple[int, str]] = {}
    for index, chain in enumerate(chains):
        source, through = _trace_back(chain.root, end_of)
        if not is_norm(through):
            source, through = _trace_sum(chain.root, end_of)
        if source is not None and through and source != index:
            found[source] = (index, through)
    return found


def _trace_sum(root: fx.Node, end_of: dict[fx.Node, int]) -> tuple[int | None, str]:
    """Follow a root back through what keeps a sum in its place, on every way, to the last end of a chain."""
    ends: dict[fx.Node, str] = {}
    todo, seen = [(root, "")], {root}
    while todo:
        node, through = todo.pop()
        if node in end_of:
            ends[node] = through
            continue
        carried = carried_input(node)
        through = through if carried else op_name(node)
        for value in [carried] if carried else _kept_inputs(node):
            if value not in seen:
                seen.add(value)
                todo.append((value, through))
    if not ends:
        return None, ""
    last = max(ends)
    return end_of[last], ends[last]


def _kept_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the arguments of an op that goes on in its result and have its shape."""
    name = op_name(node).removesuffix("_")
    positions = (0,) if name in DROPOUTS | _ACTIVATIONS else _KEEPS_SUM.get(name, ())
    values = [node.args[position] for position in positions if position < len(node.args)]
    return [value for value in values if isinstance(value, fx.Node) and shape_of(value) == shape_of(node)]


def _trace_back(root: fx.Node, end_of: dict[fx.Node, int]) -> tuple[int | None, str]:
    """Follow a root back through a norm, which may be written by hand, to the end of a chain."""
    source, through = None, ""
    todo, seen = [root], {root}
    while todo:
        node = todo.pop()
        if node in end_of:
            source = end_of[node]
            continue
        name = op_name(node)
        if node.op == "get_attr":
            continue
        if name in _NORM_OPS:
            through = name
        elif name not in _AROUND_A_NORM | _ACTIVATIONS:
            return None, ""
        for value in node.all_input_nodes:
            if value not in seen:
                seen.add(value)
                todo.append(value)
    return source, through


def short_runs(chains: Sequence[Chain], following: dict[int, tuple[int, str]]) -> dict[int, str]:
    """Map each chain of a post-norm run to what follows its sums.

    A run is two or more linked chains of at most three updates each. Longer ones are whole stacks with a norm between
    them, each a stream of its own, but for layers of more updates (Conformer). What is no norm and no activation does
    not end a stack: there one short chain is enough, and so are three of any length. An update that is no add we know
    never ends one.
    """
    reasons: dict[int, str] = {}
    targets = {target for target, _ in following.values()}
    for first in following:
        if first in targets:
            continue
        run = [first]
        while run[-1] in following:
            run.append(following[run[-1]][0])
        if _is_cut([chains[index] for index in run], {following[index][1] for index in run[:-1]}):
            for index in run:
                through = following[index][1] if index in following else following[run[-2]][1]
                reasons[index] = through
    return reasons


def _is_cut(run: Sequence[Chain], between: set[str]) -> bool:
    """Say whether the chains of a run are pieces of one stream, given the ops between them."""
    short = [len(chain.adds) <= _MOST_UPDATES for chain in run]
    if all(short) or _is_one_layer(run) or between & _UPDATES:
        return True
    return not between & (_NORM_OPS | _ACTIVATIONS) and (any(short) or len(run) > 2)


def _is_one_layer(run: Sequence[Chain]) -> bool:
    """Say whether each chain of a run is one layer: of the code of a module of its own, or of the same few lines."""
    owners = [{owner_of(add.node) for add in chain.adds} for chain in run]
    if all(len(own) == 1 for own in owners) and len(set().union(*owners)) == len(run):
        return True
    lines = [[source_line(add.node) for add in chain.adds] for chain in run]
    return all(lines[0]) and len(set(lines[0])) == len(lines[0]) and all(other == lines[0] for other in lines)


def is_norm(name: str) -> bool:
    """Say whether the op named by `links` is a norm rather than an activation."""
    return name in _NORM_OPS
