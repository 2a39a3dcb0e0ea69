"""The parts of an attached model that hold its reads: called by themselves, they would run without them, so they raise.

    attach(model)   ->   model.model(ids) raises, and so does model.model.layers[3](states)

A compiled call of the whole model traces through them. Each has a forward pre-hook, which raises as it runs; Dynamo
traces it into a mark of its own, which the backend takes out beside that of the whole model and which raises elsewhere.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import has_side_effect

from attnres_rewrite.errors import NotCompiledError, explain
from attnres_rewrite.kernels.routes import is_exporting
from attnres_rewrite.mark import Attachment

# how many `original` run of each model, and of each of its parts, by its id, in all threads
_originals: Counter[int] = Counter()
_originals_lock = threading.Lock()


def count_original(module: Any, change: int) -> None:
    """Enter (1) or leave (-1) `original` of a model or a part; the last of several threads switches it back."""
    with _originals_lock:
        _originals[id(module)] += change
        module._attnres_original = _originals[id(module)] > 0
        if not module._attnres_original:
            del _originals[id(module)]


def guarded_parts(model: nn.Module) -> list[nn.Module]:
    """Return the parts of an attached model that raise where they are called by themselves."""
    return [part for part in model.modules() if _is_guarded(part)]


def leave_original(model: Any) -> None:
    """Switch a copy that was made inside `original` to what it is outside, but for parts that are no copies."""
    for part in model.modules():
        if "_attnres_original" in vars(part) and id(part) not in _originals:
            part._attnres_original = False


def runs_original() -> bool:
    """Say whether some model runs inside `original`, in any thread."""
    return bool(_originals)


def guard_parts(model: nn.Module, attachment: Attachment) -> None:
    """Have every part of `model` that holds a read raise where it is called by itself."""
    for part in _parts_with_reads(model, attachment):
        if not _is_guarded(part):
            part.register_forward_pre_hook(_refuse_alone)
        part._attnres_original = False  # type: ignore[assignment]


def _is_guarded(part: nn.Module) -> bool:
    return _refuse_alone in part._forward_pre_hooks.values()


def release_parts(model: nn.Module) -> None:
    """Take off what `guard_parts` put on."""
    for part in model.modules():
        hooks = part._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _refuse_alone]:
            del hooks[key]
            part.__dict__.pop("_attnres_original", None)


def _parts_with_reads(model: nn.Module, attachment: Attachment) -> Iterator[nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {owner for stream in attachment.streams for read in stream.reads for owner in read.owners}
    for name, part in modules.items():
        if part is not model and any(f"{owner}.".startswith(f"{name}.") for owner in owners):
            yield part


def _refuse_alone(part: nn.Module, args: Any) -> None:
    """Raise, or leave the mark of a part in what Dynamo traces; a forward pre-hook.

    It reads its own module's flag, for which Dynamo guards: what was compiled inside `original` stays in there.
    """
    # a part that an older release pickled has no flag
    if getattr(part, "_attnres_original", False):
        return
    if torch.compiler.is_dynamo_compiling():
        if not is_exporting():
            torch.ops.attnres.part()
    else:
        raise _alone()


def _alone() -> NotCompiledError:
    return NotCompiledError(
        explain(
            "a part of an attached model is called by itself",
            None,
            "It would run without its reads: they are put in where the whole model is compiled.",
            "Call the attached model; or detach() it, then attach and compile the part, as generate() needs an encoder "
            "and a decoder; or call the part inside `with attnres_rewrite.original(model):` to run it without its "
            "reads on purpose.",
        )
    )


def _part() -> None:
    """Raise wherever it is run; only ever traced."""
    raise _alone()


torch.library.define("attnres::part", "() -> ()")
torch.library.impl("attnres::part", "CompositeExplicitAutograd", _part)
torch.library.register_fake("attnres::part", lambda: None)
has_side_effect(torch.ops.attnres.part.default)
_PART = (torch.ops.attnres.part, torch.ops.attnres.part.default)


def take_out_parts(gm: fx.GraphModule) -> None:
    """Erase the marks of parts in Dynamo's graph."""
    for graph, node in _part_marks(gm):
        graph.erase_node(node)


def refuse_parts(gm: fx.GraphModule) -> None:
    """Raise where Dynamo's graph, which is not of a whole attached model, has the mark of a part.

    Raises:
        NotCompiledError: It has.
    """
    if _part_marks(gm):
        raise _alone()


def _part_marks(gm: fx.GraphModule) -> list[tuple[fx.Graph, fx.Node]]:
    # the body of a checkpoint is a graph of its own
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return [(graph, node) for graph in graphs for node in graph.nodes if node.target in _PART]
