"""as_rewritten(): an attached model -> what rewrite() would have made of it, of the very same parameters.

    attach(model, config), train it   ->   new = as_rewritten(model, (ids,))
    new.get_parameter("layers.3.attn_res.1.query") is model.get_parameter("layers.3.attn_res.1.query")

For what needs a graph while the model stays attached: diagnose, save, torch.export, html_report, partition, unflatten.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attnres_rewrite.api import Progress, rewrite
from attnres_rewrite.attachment import attached_parts, detach, inputs_for, parameter_of
from attnres_rewrite.errors import CheckpointError, explain
from attnres_rewrite.inputs import check_inputs_given
from attnres_rewrite.mark import Attachment
from attnres_rewrite.module import RewrittenModule, attribute


def as_rewritten(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    verify: bool = True,
    progress: Progress | None = None,
) -> RewrittenModule:
    """Return the rewrite of an attached model, which stays attached and shares its parameters and buffers.

    It computes what the attached model computes under torch.compile, and goes on doing so while that is trained. What
    accelerate prepared for mixed precision is captured without: call the rewrite under torch.autocast instead.

    Args:
        model: What attach() was given, or what torch.compile, DistributedDataParallel or PEFT made of it; it is not
            changed.
        args: Positional example inputs, on the model's device. A transformers model needs none, as in `attach`.
        kwargs: Example inputs given by name.
        dynamic_shapes: As for `rewrite`.
        verify: Run the proofs; a failed one raises.
        progress: Called with the name of each stage as it starts.

    Returns:
        The rewritten model, with the config of attach(), in the mode of `model`.

    Raises:
        NotAttachedError: No part of `model` is attached.
        CheckpointError: The reads of the whole are not those that attach() found: `model` holds more than it was given,
            or was changed since.
        RewriteError: A refusal, as of `rewrite`.
        ValueError: No example inputs, or several attached models.
        TypeError: `model` is no module, or an argument is of another kind.
    """
    # callers are not all type-checked
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"as_rewritten() takes an attached nn.Module; this is a {type(model).__name__}")
    while isinstance(model, torch._dynamo.OptimizedModule | nn.parallel.DistributedDataParallel):
        model = model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model.module
    check_inputs_given(args, kwargs)
    attachment, names = _attachment_of(model)
    named = inputs_for(model, args, kwargs, "as_rewritten")
    # modules are copied, tensors are not
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    detach(twin)
    _without_autocast(twin)
    new = rewrite(twin, args, named, attachment.config, dynamic_shapes, verify=verify, progress=progress)
    _give_reads(new, model, names)
    return new


def _without_autocast(model: nn.Module) -> None:
    """Take off the forward that accelerate sets for mixed precision: autocast is its caller's, not a graph's."""
    for part in model.modules():
        if part.__dict__.pop("_original_forward", None) is not None:
            part.__dict__.pop("forward", None)


def _attachment_of(model: nn.Module) -> tuple[Attachment, list[str]]:
    """Return what attach() decided, and the names of its parameters, seen from `model`."""
    parts = list(attached_parts(model))
    if len(parts) > 1:
        raise ValueError(f"this {type(model).__name__} holds {len(parts)} attached models: give one of them")
    (prefix,) = [name for name, part in model.named_modules() if part is parts[0]]
    attachment = Attachment.from_json(parts[0]._attnres_facts)
    for name in attachment.parameter_names:
        parameter_of(parts[0], name)
    return attachment, [f"{prefix}.{name}".removeprefix(".") for name in attachment.parameter_names]


def _give_reads(new: RewrittenModule, model: nn.Module, names: Sequence[str]) -> None:
    """Put the queries, gains and gates of `model` in the places of those that `new` was given."""
    made = {name for read in new.report.reads for name in _parameters_of(new, read.query_name)}
    if made != set(names):
        missing, extra = sorted(made - set(names)), sorted(set(names) - made)
        lacking = f"It lacks {', '.join(missing[:4])}. " if missing else ""
        raise CheckpointError(
            explain(
                f"the reads of this {type(model).__name__} are not those that attach() found",
                None,
                lacking + (f"It has {', '.join(extra[:4])}, which nothing reads." if extra else ""),
                "Give the model that attach() was given, with inputs for which it runs the same layers.",
            )
        )
    for name in names:
        owner, _, leaf = name.rpartition(".")
        attribute(new, owner)._parameters[leaf] = model.get_parameter(name)


def _parameters_of(new: RewrittenModule, query_name: str) -> list[str]:
    owner = query_name.rpartition(".")[0]
    return [f"{owner}.{leaf}" for leaf in attribute(new, owner)._parameters]
