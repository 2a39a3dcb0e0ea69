"""Tell where one chain's end becomes the next chain's root through a norm, an activation or an active dropout.

x = norm(x + f(x))     post-norm: the sum never runs on, so each chain holds a layer's updates only
x = relu(x + f(x))     the same for a ResNet
x = drop(x + f(x))     the same in train mode, where each dropout draws a mask of its own
"""

from collections.abc import Sequence

from torch import fx

from attnres_rewrite.fxgraph import op_name
from attnres_rewrite.passes.carriers import CASTS, DROPOUTS, VIEWS
from attnres_rewrite.passes.chains import Chain

_NORM_OPS = frozenset(
    """layer_norm rms_norm native_layer_norm _fused_rms_norm group_norm batch_norm instance_norm mean var var_mean
    linalg_vector_norm""".split()
)
_AROUND_A_NORM = (
    CASTS | DROPOUTS | VIEWS | frozenset("pow square sqrt rsqrt reciprocal mul div add sub getitem clamp_min".split())
)
_ACTIVATIONS = frozenset("relu gelu silu tanh sigmoid leaky_relu hardtanh relu6 elu mish relu_ silu_".split())
_MOST_UPDATES = 3  # attention, cross-attention, MLP: more updates between two norms make a stack, not a layer


def links(chains: Sequence[Chain]) -> dict[int, tuple[int, str]]:
    """Map a chain's index to the chain whose root is made from its end, and by what, e.g. "layer_norm"."""
    end_of = {chain.end: index for index, chain in enumerate(chains)}
    found: dict[int, tuple[int, str]] = {}
    for index, chain in enumerate(chains):
        source, through = _trace_back(chain.root, end_of)
        if source is not None and through and source != index:
            found[source] = (index, through)
    return found


def _trace_back(root: fx.Node, end_of: dict[fx.Node, int]) -> tuple[int | None, str]:
    """Follow a root back through norms, activations and dropouts to the end of a chain."""
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
        if name in _NORM_OPS or (name in _ACTIVATIONS | DROPOUTS and not through):
            through = name
        elif name not in _AROUND_A_NORM:
            return None, ""
        for value in node.all_input_nodes:
            if value not in seen:
                seen.add(value)
                todo.append(value)
    return source, through


def short_runs(chains: Sequence[Chain], following: dict[int, tuple[int, str]]) -> dict[int, str]:
    """Map each chain of a post-norm run to what follows its sums.

    A run is two or more linked chains of at most three updates each. Longer ones are whole stacks with a
    norm between them, each a stream of its own.
    """
    reasons: dict[int, str] = {}
    targets = {target for target, _ in following.values()}
    for first in following:
        if first in targets:
            continue
        run = [first]
        while run[-1] in following:
            run.append(following[run[-1]][0])
        if all(len(chains[index].adds) <= _MOST_UPDATES for index in run):
            for index in run:
                through = following[index][1] if index in following else following[run[-2]][1]
                reasons[index] = through
    return reasons


def is_norm(name: str) -> bool:
    """Say whether the op named by `links` is a norm rather than an activation."""
    return name in _NORM_OPS
