"""The whole product on one generated network: failure(spec) -> None, or what went wrong."""

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import attnres_rewrite as ar

from .graphs import innermost_module
from .networks import Generated, build
from .specs import NetworkSpec

DYNAMIC_EVERY = 5


@dataclass(frozen=True, slots=True)
class Failure:
    """A step that failed. Two failures are alike when step and error class are."""

    step: str  # "found", "rewrite", "report", "gradients"
    error: str
    details: str

    def alike(self, other: "Failure | None") -> bool:
        return other is not None and (self.step, self.error) == (other.step, other.error)


def failure(
    spec: NetworkSpec, config_of: "Callable[[NetworkSpec, Generated], ar.AttnResConfig] | None" = None
) -> Failure | None:
    """Find, rewrite, prove and train the network of `spec`; return the first step that fails.

    `config_of` draws what to rewrite with; random_config if it is None.
    """
    made = build(spec)
    step = "rewrite"
    try:
        # dynamic shapes double the time of a capture, and so does the second mode: most networks do without
        shapes = None if spec.seed % DYNAMIC_EVERY == 0 else {}
        both_modes = spec.seed % DYNAMIC_EVERY == 0 or (is_random(spec) and spec.seed % 2 == 0)
        given = made.model if both_modes else exported(made)
        new = ar.rewrite(given, made.args, config=(config_of or random_config)(spec, made), dynamic_shapes=shapes)
        step = "found"
        check_found(made, new)
        step = "report"
        check_report(made, new)
        step = "gradients"
        check_gradients(made, new)
    except Exception as why:
        # the message of an assertion that pytest did not rewrite may be empty
        details = str(why) or traceback.format_exc(limit=-1)
        return Failure(step, type(why).__name__, details)
    return None


def is_random(spec: NetworkSpec) -> bool:
    """Say whether train mode draws random numbers, so that it is a graph of its own."""
    return spec.drop != "none" or spec.embed_dropout


def exported(made: Generated) -> torch.export.ExportedProgram:
    """Return the network as the program of one mode, which serves both."""
    return torch.export.export(made.model, made.args, strict=False)


def random_config(spec: NetworkSpec, made: Generated) -> ar.AttnResConfig:
    """Draw the config to rewrite with from the seed of the spec."""
    draw = random.Random(f"config {spec.seed}")
    output = draw.choice(("sum", "mean"))
    key_norm = draw.random() < 0.8
    fewest = min(len(stream) for stream in made.known)
    grouping: dict[str, Any] = draw.choice(
        (
            {},
            {"num_blocks": "full"},
            {"num_blocks": draw.randint(1, fewest)},
            {"block_size": draw.randint(1, 4)},
        )
    )
    schedule = draw.choice(("auto", "direct", "two_phase"))
    output = output if made.mean_preserves else "sum"
    return ar.AttnResConfig(output=output, key_norm=key_norm, schedule=schedule, **grouping)


def variant_config(spec: NetworkSpec, made: Generated) -> ar.AttnResConfig:
    """Draw a config as random_config does, with one or more variants of the read."""
    draw = random.Random(f"variant {spec.seed}")
    config = random_config(spec, made)
    chosen: dict[str, Any] = {}
    while not chosen:
        form = draw.choice(("heads", "rank", "neither"))
        if form == "heads":
            heads = [number for number in range(2, spec.width + 1) if spec.width % number == 0]
            chosen["num_heads"] = draw.choice(heads)
        elif form == "rank":
            chosen["key_rank"] = draw.randint(1, spec.width)
        if draw.random() < 0.5:
            chosen["gate"] = True
        if draw.random() < 0.5:
            chosen["recency_bias"] = draw.choice((-1.0, 0.5, 2.0, 8.0))
    # what AttnResConfig says contradicts
    if chosen.get("gate"):
        chosen["output"] = "sum"
    if config.schedule == "two_phase" and ("num_heads" in chosen or "key_rank" in chosen):
        chosen["schedule"] = "auto"
    return replace(config, **chosen)


def check_found(made: Generated, new: ar.RewrittenModule) -> None:
    """In each mode the updates found are the known ones, in order, whatever the order of the streams."""
    for program in new.programs.values():
        streams = [plan.stream for plan in program.plans]
        found = [tuple(innermost_module(update.add) for update in stream.updates) for stream in streams]
        assert sorted(found) == sorted(made.known), f"found {found}\nknown {made.known}"


def check_report(made: Generated, new: ar.RewrittenModule) -> None:
    """The proofs passed, and the report counts what is known."""
    assert new.report.verify is not None
    assert new.report.verify.passed, new.report.verify
    counted = sorted(stream.num_updates for stream in new.report.streams)
    assert counted == sorted(len(stream) for stream in made.known), counted


def check_gradients(made: Generated, new: ar.RewrittenModule) -> None:
    """One backward, in train mode where there is one, reaches every query with a finite gradient."""
    if True in new.programs:
        new.train()
    outputs = [leaf for leaf in pytree.tree_leaves(new(*made.args)) if isinstance(leaf, Tensor)]
    loss = torch.stack([out.square().mean() for out in outputs if out.is_floating_point()]).sum()
    loss.backward()
    queries = {name: p for name, p in new.named_parameters() if name.endswith(".query")}
    assert len(queries) >= len(made.known), sorted(queries)
    for name, query in queries.items():
        assert query.grad is not None, f"{name} has no gradient"
        assert query.grad.isfinite().all(), f"{name} has the gradient {query.grad}"
