"""The reads of a compiled call -> the same, with the parameters that attach() made for them.

A read belongs to a module: a call that runs other layers than attach() saw, or in another order, is refused.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from attnres_rewrite.errors import StreamMismatchError, explain
from attnres_rewrite.fxgraph import module_path, owner_of
from attnres_rewrite.mark import AttachedStream
from attnres_rewrite.records import BlockPlan


def with_names(plan: BlockPlan, stream: AttachedStream, model_path: str) -> BlockPlan:
    """Name the reads of one stream of a call as those of the attached one; the model is at `model_path` in the graph.

    Raises:
        StreamMismatchError: Another module reads, a read is new, or the blocks are others.
    """
    if plan.ends != stream.ends:  # of block_layers: the others follow from the number of updates
        raise StreamMismatchError(
            explain(
                f"the blocks of {stream.name} end at updates {_listed(plan.ends)} in this call, and did at "
                f"{_listed(stream.ends)} when it was attached",
                None,
                "block_layers counts the layers that Dynamo names.",
                _CALL_MODULES,
            )
        )
    attached = {read.state: read for read in stream.reads}
    for read in plan.reads:
        if read.state not in attached:
            raise StreamMismatchError(
                explain(
                    f"this call reads state {read.state} of {stream.name}, which nothing read when it was attached",
                    read.source_line or None,
                    "There is no query for that read.",
                    "Attach with example inputs that make the model return the same things.",
                )
            )
        owner, owners = _inside(read.owner, model_path), attached[read.state].owners
        reader = plan.stream.readers[read.state][0]
        named = [_inside(path, model_path) for path in (owner_of(reader), _checkpointed_module(reader))]
        if owner not in owners and not any(_lies_between(owner, module, path) for module in owners for path in named):
            raise StreamMismatchError(
                explain(
                    f"state {read.state} of {stream.name} is read by {owner or 'the model itself'} in this call, "
                    f"and was by {owners[0] or 'the model itself'} when it was attached",
                    read.source_line or None,
                    f"The query {attached[read.state].name} belongs to the latter.",
                    "Attach with example inputs of this kind, attach(model, config, args, kwargs), and after modules "
                    f"were wrapped or replaced.\n  {_CALL_MODULES}",
                )
            )
    return replace(plan, reads=tuple(replace(read, name=attached[read.state].name) for read in plan.reads))


_CALL_MODULES = "Call modules, not their methods: checkpoint(layer, x), not checkpoint(layer.forward, x)."


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _lies_between(owner: str, module: str, named: str) -> bool:
    """Say whether a module lies inside of `owner`, and is `named` or lies around it.

    Dynamo does not name a layer whose method is called, as by checkpoint(layer.__call__, x), but names what is in it.
    """
    inside = f"{module}.".startswith(f"{owner}.") or not owner
    return inside and module != owner and f"{named}.".startswith(f"{module}.")


def _checkpointed_module(reader: fx.Node) -> str:
    """Return the innermost module that holds all those that run in the activation checkpoint of a node; "" for none."""
    number, around = reader.meta.get("ac_graph_id"), module_path(reader)
    if number is None:
        return ""
    paths = [module_path(node) for node in reader.graph.nodes if node.meta.get("ac_graph_id") == number]
    inner = [path[len(around)].split(".") for path in paths if path[: len(around)] == around != path]
    alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*inner, strict=False))
    return ".".join(parts[0] for parts in alike)


def _inside(path: str, model_path: str) -> str:
    """Return a module's path, seen from the attached model, without the wrappers that torch puts around modules.

    Whoever reads what the model returns stands for the model itself.
    """
    inside = f"{path}.".startswith(f"{model_path}.") or not model_path
    inner = path.removeprefix(model_path).split(".") if inside else []
    return ".".join(part for part in inner if part and part not in _WRAPPERS)


_WRAPPERS = frozenset(["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
