"""torch.compile(backend="attnres"): the passes of rewrite() between Dynamo and another backend, Inductor by default.

Dynamo's graph of an attached model -> find and take out its mark -> training IR -> normalize_adds -> find_stream
-> plan_blocks -> insert_reads -> schedule_reads -> fuse_reads -> Dynamo's calling convention -> Inductor

Nothing is kept between calls: what attach() decided is in the mark. A graph in which the stream is not the one that
attach() found is refused. Dynamo hands the refusal on as BackendCompilerFailed, with its text.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import fx, nn

from attnres_rewrite.api import plan_program, put_reads_in
from attnres_rewrite.attached_parts import refuse_parts, runs_original, take_out_parts
from attnres_rewrite.attached_reads import with_names
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import (
    GraphBreakError,
    NoStreamError,
    NotAttachedError,
    RewriteError,
    StreamMismatchError,
    explain,
)
from attnres_rewrite.fxgraph import module_path, plain_path
from attnres_rewrite.inductor_fix import mend_inductor
from attnres_rewrite.mark import Attachment
from attnres_rewrite.records import BlockPlan
from attnres_rewrite.training_ir import dynamo_source, to_dynamo, to_training_ir
from attnres_rewrite.version import __version__

Compiled = Callable[..., Any]
_counts: Counter[str] = Counter()


def stats() -> Mapping[str, int]:
    """Return what the backend did in this process since `reset_stats`.

    "rewritten graphs" that it compiled and the "reads" in them; "rewritten calls" of those; "original graphs", compiled
    inside `original(model)`; "plain graphs", compiled as they came: what follows a graph break behind the stream, and
    helpers without parameters.
    """
    return dict(_counts)


def reset_stats() -> None:
    """Forget all counts."""
    _counts.clear()


def attnres(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Compiled:
    """Compile one of Dynamo's graphs; registered as the backend "attnres".

    Args:
        gm: The graph.
        example_inputs: Its inputs.
        mode: As torch.compile takes it; for Inductor only.
        options: "backend", the name of the backend or the function that compiles the rewritten graph ("inductor");
            fields of AttnResConfig, which must be those of attach(); everything else is Inductor's.

    Raises:
        NotAttachedError: The graph is of a model that attach() does not know.
        GraphBreakError: The stream goes on in another graph.
        StreamMismatchError: The stream is not the one that attach() found.
        ValueError: An option is unknown, or contradicts attach().
    """
    chosen = Options.of(mode, options)
    _refuse_split_graphs()
    marks = list(gm.graph.find_nodes(op="call_function", target=_MARK))
    if marks:
        take_out_parts(gm)
    else:
        refuse_parts(gm)
    if marks:
        attachment = Attachment.from_json(marks[0].args[1])  # type: ignore[arg-type]
        chosen.check(attachment.config)
        num_reads = rewrite_graph(gm, attachment, marks)
        compiled = chosen.compile(gm, example_inputs)
        _counts.update({"rewritten graphs": 1, "reads": num_reads})
        return _counted(compiled)
    if not runs_original():
        _refuse_unattached(gm)
    compiled = chosen.compile(gm, example_inputs)
    _counts["original graphs" if runs_original() else "plain graphs"] += 1
    return compiled


_MARK = torch.ops.attnres.mark
_MARKED = torch.ops.attnres.marked


def rewrite_graph(gm: fx.GraphModule, attachment: Attachment, marks: Sequence[fx.Node]) -> int:
    """Rewrite the attached stream in Dynamo's graph; return the number of reads."""
    if len(marks) > 1:
        raise StreamMismatchError(
            explain(
                f"{len(marks)} calls of attached models are in one compiled function",
                None,
                "Which of the streams in it belongs to which call cannot be told.",
                'Compile the model, not the function around it: model.compile(backend="attnres").',
            )
        )
    model_path = _path_of_model(marks[0], attachment)
    names = _take_out(gm.graph, marks[0], attachment)
    traced = to_training_ir(gm, names)
    try:
        planned = plan_program(traced.module, attachment.config)
        plans = _matched(planned.plans, attachment, gm, model_path)
    except NoStreamError as error:
        raise _broken(gm, "The graph that ends there holds no stream.") or error from error
    put_reads_in(traced.module, plans, attachment.config)
    to_dynamo(traced, gm)
    return sum(len(plan.reads) for plan in plans)


def _path_of_model(mark: fx.Node, attachment: Attachment) -> str:
    """Return where the attached model is, as the modules of this graph are named."""
    if around := module_path(mark):
        return around[-1]
    # a function around its forward was compiled, as that of accelerate's mixed precision: a query knows whose it is
    parameters: Sequence[fx.Node] = mark.args[0]  # type: ignore[assignment]
    path, name = plain_path(dynamo_source(parameters[0])), attachment.parameter_names[0]
    return path.removesuffix(name).rstrip(".") if path.endswith(name) else ""


def _take_out(graph: fx.Graph, mark: fx.Node, attachment: Attachment) -> dict[str, str]:
    """Erase the mark; return which placeholder holds which query or gain, by their names."""
    parameters: Sequence[fx.Node] = mark.args[0]  # type: ignore[assignment]
    names: dict[str, str] = {}
    for node, name in zip(parameters, attachment.parameter_names, strict=True):
        if node.op != "placeholder":
            raise StreamMismatchError(
                explain(
                    f"{name} is computed in this call, not stored",
                    None,
                    "A parametrization of it does that, for one. Queries and gains are read as they are.",
                    "Undo it: torch.nn.utils.parametrize.remove_parametrizations(module, name).",
                )
            )
        if node.name in names:
            raise StreamMismatchError(
                explain(
                    f"{names[node.name]} and {name} are one tensor",
                    None,
                    "Each read has a query and a gain of its own.",
                    "Undo the tie, or detach() and attach() anew.",
                )
            )
        names[node.name] = name
    for marked in list(mark.users):
        marked.replace_all_uses_with(marked.args[0])  # type: ignore[arg-type]
        graph.erase_node(marked)
    graph.erase_node(mark)
    return names


def _matched(
    plans: Sequence[BlockPlan], attachment: Attachment, gm: fx.GraphModule, model_path: str
) -> list[BlockPlan]:
    """Give the reads of this graph the parameters that attach() made for them; the model is at `model_path` in it."""
    found = [(len(plan.stream.updates), plan.stream.width) for plan in plans]
    wanted = [(stream.num_updates, stream.width) for stream in attachment.streams]
    if found != wanted:
        seen = f"This call has {_spelled(found)}; attach() found {_spelled(wanted)}."
        raise _broken(gm, seen) or StreamMismatchError(
            explain(
                "the compiled call has another stream than attach() found",
                None,
                seen,
                "Attach with example inputs of this kind, attach(model, config, args, kwargs); and where other modules "
                'are compiled with the attached one, compile it alone, model.compile(backend="attnres"). Parts '
                "that are called by themselves, as generate() calls an encoder, are attached and compiled each.",
            )
        )
    return [with_names(plan, stream, model_path) for plan, stream in zip(plans, attachment.streams, strict=True)]


def _spelled(streams: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"a stream of {updates} updates and width {width}" for updates, width in streams) or "none"


def _broken(gm: fx.GraphModule, seen: str) -> RewriteError | None:
    """Return the refusal for a graph that Dynamo had to end before the model did, or None."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    frames = [frame for frame in reason.user_stack if frame.filename]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
    text = _first_paragraph(str(reason.reason))
    remedies = [remedy for word, remedy in _REMEDIES if word in f"{where} {text}"]
    return GraphBreakError(
        explain(
            "a graph break cuts the stream",
            where,
            f"{text}\n  {seen}",
            "\n  ".join([*remedies, "TORCH_LOGS=graph_breaks in the environment makes torch list every break."]),
        )
    )


_REMEDIES = (
    (
        "logging.Logger",
        "transformers logs where a model keeps a cache under gradient checkpointing: model.config.use_cache = False.",
    ),
    (
        "requires_grad_()",
        "gradient_checkpointing_enable() of transformers has frozen embeddings require gradients, for reentrant "
        "checkpoints alone: call model.disable_input_require_grads() after it, and leave gradient_checkpointing of "
        "Trainer off, which would enable it anew.",
    ),
    (
        "output_capturing.py",
        "transformers collects output_hidden_states and output_attentions in a way that Dynamo cannot trace: leave "
        "them out, or call what rewrite() returns.",
    ),
)


def _first_paragraph(text: str) -> str:
    """Return what happened, why, and torch's hint, without the developer's context behind them."""
    lines = text.strip().partition("\n\n")[0].splitlines()
    return "\n  ".join(line.strip() for line in lines)


def _refuse_unattached(gm: fx.GraphModule) -> None:
    """Let a graph pass that is no model: one behind a graph break, or without parameters."""
    given = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    continues = any("torch_dynamo_resume_in" in (node.meta.get("stack_trace") or "") for node in gm.graph.nodes)
    if continues or not any(isinstance(value, nn.Parameter) for value in given):
        return
    raise NotAttachedError(
        explain(
            "the model was not attached, so it has no reads to put in",
            None,
            "backend='attnres' looks for the queries that attach() adds. A part of an attached model cannot show them.",
            "Before torch.compile: attnres_rewrite.attach(model, attnres_rewrite.AttnResConfig(num_blocks=8))",
        )
    )


def _refuse_split_graphs() -> None:
    """Refuse the pieces into which torch cuts the graph of a DistributedDataParallel model."""
    module = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if module is not None and torch._dynamo.config.optimize_ddp in (True, "ddp_optimizer"):
        raise GraphBreakError(
            explain(
                "torch cuts the graph of a DistributedDataParallel model at its buckets, and the stream with it",
                None,
                "torch._dynamo.config.optimize_ddp is on.",
                "Turn it off before the first call: torch._dynamo.config.optimize_ddp = False",
            )
        )


def _counted(compiled: Compiled) -> Compiled:
    def call(*args: Any) -> Any:
        _counts["rewritten calls"] += 1
        return compiled(*args)

    return call


@dataclass(frozen=True, slots=True)
class Options:
    """What torch.compile(..., mode=, options=) asked for."""

    backend: str | Compiled = "inductor"
    claimed: Mapping[str, Any] = field(default_factory=dict[str, Any])  # fields of AttnResConfig
    inductor: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, mode: str | None, options: Mapping[str, Any] | None) -> "Options":
        """Sort the options.

        Raises:
            ValueError: One is unknown, or is for Inductor and another backend was asked for.
        """
        rest = dict(options or {})
        backend = rest.pop("backend", "inductor")
        if backend in ("attnres", attnres):
            raise ValueError('options={"backend": "attnres"} would run the rewrite inside itself')
        config_fields = {entry.name for entry in fields(AttnResConfig)}
        claimed = {key: rest.pop(key) for key in list(rest) if key in config_fields}
        patches = torch._inductor.list_mode_options(mode) if mode not in (None, "default") else {}
        if backend != "inductor" and rest:
            raise ValueError(f"options {sorted(rest)} would be Inductor's, and the backend is {backend!r}")
        known = torch._inductor.list_options()
        if unknown := sorted(key for key in rest if key.replace("-", "_") not in known):
            raise ValueError(
                f"unknown options {unknown}: give 'backend', a field of AttnResConfig ({sorted(config_fields)}) or "
                "one of torch._inductor.list_options()"
            )
        return cls(backend, claimed, patches | {key.replace("-", "_"): value for key, value in rest.items()})

    def check(self, config: AttnResConfig) -> None:
        """Raise ValueError when an option is not what attach() was given."""
        for name, value in self.claimed.items():
            if value != getattr(config, name):
                raise ValueError(
                    f"options={{{name!r}: {value!r}}} contradicts attach(), which was given {getattr(config, name)!r}; "
                    "leave it out, or detach() and attach() anew"
                )

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        """Hand a graph to the backend behind this one."""
        if self.backend == "inductor":
            from torch._inductor import config as inductor_config
            from torch._inductor.compile_fx import compile_fx

            mend_inductor()
            # every configuration is part of the keys of torch's caches, and the kernels behind our custom ops are not
            marked = inductor_config.unsafe_marked_cacheable_functions
            patches = {"unsafe_marked_cacheable_functions": {**marked, "attnres_rewrite": __version__}, **self.inductor}
            return compile_fx(gm, list(example_inputs), config_patches=patches)  # type: ignore[return-value]
        behind = torch._dynamo.lookup_backend(self.backend)  # type: ignore[arg-type]
        return behind(gm, list(example_inputs))
