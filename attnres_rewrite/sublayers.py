"""What each update of a stream is: which state it reads, whose it is, attention or MLP.

    x1 = x0 + attn(norm(x0));  x2 = x1 + mlp(norm(x1))
    ->  (update 1, layers.0.attn, reads 0, "attention"), (update 2, layers.0.mlp, reads 1, "mlp")

The nodes between a state and an update tell: modules that run for this update alone name it, norms apart (Llama's
post_attention_layernorm stands before the MLP).
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from attnres_rewrite.fxgraph import module_classes, module_path, owner_of
from attnres_rewrite.records import ResidualStream

SublayerKind = Literal["attention", "mlp", ""]

_ATTENTION = frozenset("attn attention mha mla gqa".split())
_MLP = frozenset("mlp ffn ff ffw feedforward moe glu expert experts".split())
_KNOWN = _ATTENTION | _MLP
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")


@dataclass(frozen=True, slots=True)
class Sublayer:
    """What adds one update.

    reads: the newest state that the update is computed from, or None when it reads no state at all ("inject").
    kind: "attention" or "mlp" when the names of its own modules say so and do not say both, else "".
    """

    owner: str
    reads: int | None
    kind: SublayerKind


def sublayers_of(stream: ResidualStream) -> tuple[Sublayer, ...]:
    """Describe every update of a stream, in order."""
    states = _states_by_node(stream)
    depends = _depending(stream.root)
    regions = [_region(update.branch, states, depends) for update in stream.updates]
    modules = [_modules_of(nodes) for nodes, _ in regions]
    shared = Counter(name for of in modules for name in of)
    found: list[Sublayer] = []
    for update, (_, reads), of in zip(stream.updates, regions, modules, strict=True):
        own = {name: class_name for name, class_name in of.items() if shared[name] == 1}
        around = [name for name in module_path(update.branch) if name in own]
        found.append(Sublayer(around[0] if around else owner_of(update.branch), reads, _kind(own)))
    return tuple(found)


def kind_before(state: int, sublayers: Sequence[Sublayer]) -> SublayerKind:
    """Return what reads a state: the kind of all updates whose newest state it is, "" when they differ or say none."""
    kinds: set[SublayerKind] = {sublayer.kind for sublayer in sublayers if sublayer.reads == state}
    return kinds.pop() if len(kinds) == 1 else ""


def _states_by_node(stream: ResidualStream) -> dict[fx.Node, int]:
    """Number the nodes on the stream: each state, and the carriers behind it."""
    states = {node: number for number, node in enumerate(stream.states)}
    for number, update in enumerate(stream.updates):
        states |= dict.fromkeys(update.carriers, number)
    return states


def _depending(root: fx.Node) -> set[fx.Node]:
    """Return the root and every node that is computed from it: tables and masks that all layers share are not."""
    found = {root}
    for node in root.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _region(branch: fx.Node, states: Mapping[fx.Node, int], depends: set[fx.Node]) -> tuple[set[fx.Node], int | None]:
    """Return the nodes between the stream and an update, and the newest state that they start from."""
    nodes: set[fx.Node] = set()
    newest: int | None = None
    waiting = [branch]
    while waiting:
        node = waiting.pop()
        if node in nodes or node not in depends:
            continue
        if node in states:
            newest = states[node] if newest is None else max(newest, states[node])
            continue
        nodes.add(node)
        waiting += node.all_input_nodes
    return nodes, newest


def _modules_of(nodes: set[fx.Node]) -> dict[str, str]:
    """Return the classes of the modules whose code made the nodes, by FQN."""
    calls = (node for node in nodes if node.op == "call_function")
    return {name: of for node in calls for name, of in zip(module_path(node), module_classes(node), strict=True)}


def _kind(own: Mapping[str, str]) -> SublayerKind:
    texts = (text.rpartition(".")[2] for pair in own.items() for text in pair)
    kinds: set[SublayerKind] = {kind for text in texts if (kind := _kind_of_name(text))}
    return kinds.pop() if len(kinds) == 1 else ""


def _kind_of_name(text: str) -> SublayerKind:
    parts = [part.lower() for part in _WORD.findall(text)]
    if any("norm" in part for part in parts):
        return ""
    words = itertools.chain.from_iterable(zip(map("".join, itertools.pairwise(["", *parts])), parts, strict=True))
    # the last word tells: Qwen3MoeAttention is attention in a model of experts
    said: list[SublayerKind] = ["attention" if word in _ATTENTION else "mlp" for word in words if word in _KNOWN]
    return said[-1] if said else ""
