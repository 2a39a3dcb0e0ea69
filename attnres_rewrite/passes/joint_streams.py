"""Tell streams that run side by side and read each other from what only looks like them.

    a1 = a0 + f(norm(a0), norm(b0));  b1 = b0 + g(norm(a0), norm(b0));  ...

So do image and text tokens in an MM-DiT, where both meet in one attention. Each is a residual stream of its own, with
reads of its own, as encoder and decoder are, when

1. every update reads the stream it is added to, not only by way of another: the halves of reversible layers do not
2. every way from a state, but for the last, leads into an update of one of them
3. every such state is read through norms: the copies that hyper-connections mix are not, nor are attention scores that
   are summed over layers
4. it takes turns with another: each reads the other at several of its states. A recurrence inside a layer knows one
   state of the network, and the network one of it.

Does not handle: updates that read no stream (an injection).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import networkx as nx
from torch import fx

from attnres_rewrite.fxgraph import value_inputs
from attnres_rewrite.passes.chains import Chain, StreamAdd
from attnres_rewrite.passes.reachability import Reachability
from attnres_rewrite.passes.scale_invariance import scale_culprits

Group = frozenset[fx.Node]  # the ends of streams that run side by side


def joint_groups(
    chains: Sequence[Chain], reach: Reachability, exchange: Callable[[Chain, Chain, Reachability], bool]
) -> tuple[Group, ...]:
    """Return the groups of two or more chains that run side by side; `exchange` says whether two feed each other."""
    partners: nx.Graph = nx.Graph()
    pairs = combinations(range(len(chains)), 2)
    partners.add_edges_from((i, j) for i, j in pairs if exchange(chains[i], chains[j], reach))
    found: list[Group] = []
    for component in nx.connected_components(partners):
        group = [chains[index] for index in sorted(component)]
        # what is none of them does not count for the others
        while len(group) > len(kept := _side_by_side(group, reach)) > 1:
            group = kept
        if len(kept) > 1:
            found.append(frozenset(chain.end for chain in kept))
    return tuple(found)


def _side_by_side(group: Sequence[Chain], reach: Reachability) -> list[Chain]:
    """Return the chains of a group that are streams when all of them are."""
    on_stream = {add.node: 0 if add.node.args[0] is add.stream else 1 for chain in group for add in chain.adds}
    culprits = scale_culprits(reach.nodes, list(on_stream), on_stream)
    states = {state for chain in group for state in chain.states}
    reads = {add.node: _read_directly(add, states) for chain in group for add in chain.adds}
    return [
        chain
        for chain in group
        if not any(state in culprits for state in chain.states[:-1])
        and all(reads[add.node] & set(chain.states) for add in chain.adds)
        and any(_take_turns(chain, other, reads) for other in group if other is not chain)
        and not _leaks(chain, on_stream)
    ]


def _read_directly(add: StreamAdd, states: set[fx.Node]) -> set[fx.Node]:
    """Return the states that a branch reads without passing through another state."""
    found: set[fx.Node] = set()
    todo, seen = [add.branch], {add.branch}
    while todo:
        node = todo.pop()
        if node in states:
            found.add(node)
        else:
            new = [source for source in value_inputs(node) if source not in seen]
            todo += new
            seen.update(new)
    return found


def _take_turns(one: Chain, other: Chain, reads: Mapping[fx.Node, set[fx.Node]]) -> bool:
    """Say whether each reads the other at two or more of its states, counting the newest that an update reads."""

    def newest_read(reader: Chain, read: Chain) -> set[fx.Node]:
        newest = (
            next((state for state in reversed(read.states) if state in reads[add.node]), None) for add in reader.adds
        )
        return {state for state in newest if state is not None}

    return len(newest_read(one, other)) > 1 and len(newest_read(other, one)) > 1


def _leaks(chain: Chain, adds: Mapping[fx.Node, int]) -> bool:
    """Say whether a state, but for the last, reaches an output by a way without an update."""
    todo: list[fx.Node] = list(chain.states[:-1])
    seen = set(todo)
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return True
            if user not in adds and user not in seen:
                todo.append(user)
                seen.add(user)
    return False
