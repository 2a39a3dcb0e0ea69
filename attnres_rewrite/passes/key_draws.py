"""Give every random draw of a graph a key and the number of its site, so that all ways to run it draw the same.

    y = dropout(x, 0.1, True)   ->   y = keyed_dropout(x, 0.1, key, 3)          key: a new input of the graph, []

The site is the place among the draws of the whole graph: cut into stages, each stage draws what the whole one does.
Dropouts, in place too, attention with dropout, rand, rand_like, uniform_, bernoulli and bernoulli_ are replaced; a
dropout that does nothing stays. Any other draw is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from attnres_rewrite.errors import PartitionError, explain
from attnres_rewrite.fxgraph import argument, op_name, place_of, tensor_of
from attnres_rewrite.keyed_random import (
    keyed_attention,
    keyed_bernoulli,
    keyed_dropout,
    keyed_uniform,
)
from attnres_rewrite.passes.bodies import draw_inside
from attnres_rewrite.passes.carriers import DROPOUTS

KEY = "attnres_draw_key"

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def key_draws(graph: fx.Graph, root: nn.Module) -> int:
    """Replace the draws of a graph, in place; return how many there are. The input is added only if there is one.

    Args:
        graph: What is changed.
        root: What holds the bodies of its calls.

    Raises:
        PartitionError: An op draws in a way that has no keyed form, or under no_grad, autocast or torch.cond.
    """
    for node in graph.nodes:
        if (inside := draw_inside(node, root, is_draw)) is not None:
            raise PartitionError(_inside_a_body(node, inside))
    draws = [node for node in graph.nodes if is_draw(node)]
    if not draws:
        return 0
    key = _key_input(graph)
    for site, node in enumerate(draws):
        call, args, kwargs = _keyed(node, key, site)
        with graph.inserting_before(node):
            new = graph.call_function(call, args, kwargs)
            new.meta = dict(node.meta)
            if op_name(node).endswith("_"):
                new = graph.call_function(torch.ops.aten.copy_.default, (node.args[0], new))
                new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return len(draws)


def is_draw(node: fx.Node) -> bool:
    """Say whether a node draws random numbers, as it is called."""
    if not (isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags):
        return False
    if op_name(node).removesuffix("_") in DROPOUTS:
        return bool(argument(node, 1, "p", 0.5)) and argument(node, 2, "train", True) is not False
    if op_name(node) == "scaled_dot_product_attention":
        return bool(argument(node, 4, "dropout_p", 0.0))
    return True


def _inside_a_body(call: fx.Node, draw: fx.Node) -> str:
    return explain(
        f"{op_name(draw)} draws random numbers inside {op_name(call)}",
        place_of(draw),
        "The capture keeps what is under no_grad, autocast or torch.cond as one call, whose draws are not seen.",
        'Draw outside of it, use eval mode, or partition(..., dropout="torch") if each rank may draw for itself.',
    )


def _key_input(graph: fx.Graph) -> fx.Node:
    behind = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(behind):
        key = graph.placeholder(KEY)
    key.meta["val"] = torch.empty((), dtype=torch.int64, device="meta")
    return key


def _keyed(node: fx.Node, key: fx.Node, site: int) -> Call:
    name, value, first = op_name(node), tensor_of(node), argument(node, 0, "self")
    if name in ("dropout", "dropout_", "feature_dropout", "feature_dropout_"):
        return keyed_dropout, (first, node.args[1], key, site), {"whole_channels": name.startswith("feature")}
    if name == "scaled_dot_product_attention":
        return keyed_attention, (*_attention_arguments(node), key, site), {}
    if value is not None and name in ("rand", "rand_like", "uniform_"):
        limits = (argument(node, 1, "from", 0.0), argument(node, 2, "to", 1.0)) if name == "uniform_" else (0.0, 1.0)
        return keyed_uniform, (first, key, site, value.device, value.dtype, *limits), {}
    if name in ("bernoulli", "bernoulli_"):
        probability = first if str(node.target).endswith("bernoulli.default") else argument(node, 1, "p", 0.5)
        return keyed_bernoulli, (probability, first, key, site), {}
    raise PartitionError(
        explain(
            f"{name} draws random numbers, and has no form that draws the same in every partition",
            place_of(node),
            "Each rank would draw for itself.",
            'Use eval mode or set its rate to 0, or partition(..., dropout="torch") if that is acceptable.',
        )
    )


def _attention_arguments(node: fx.Node) -> tuple[Any, ...]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    return tuple(argument(node, place, name, defaults.get(name)) for place, name in enumerate(names))
