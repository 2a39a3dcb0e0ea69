"""The whole flow of a rewrite, one line a stage. Start reading here.

capture -> normalize_adds -> find_stream -> plan_blocks -> insert_reads -> schedule_reads -> fuse_reads -> report
-> verify
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from attnres_rewrite.capture import capture
from attnres_rewrite.carried_config import warn_of_lost_reads
from attnres_rewrite.config import AttnResConfig, check_config
from attnres_rewrite.copying import copy_graph, map_plan
from attnres_rewrite.errors import ModeMismatchError, NoStreamError, ProofError, explain
from attnres_rewrite.fxgraph import tensor_of
from attnres_rewrite.inputs import check_inputs_given, plain_inputs
from attnres_rewrite.kernels.routes import kernels_of, unnoted, why_no_kernel, why_no_variant_kernel
from attnres_rewrite.module import ExampleInputs, Program, RewrittenModule, require_rewritten
from attnres_rewrite.passes.find_stream import find_stream
from attnres_rewrite.passes.fuse_reads import fuse_reads
from attnres_rewrite.passes.grad_modes import refuse_mixed_grad_modes
from attnres_rewrite.passes.insert_reads import add_parameters, insert_reads
from attnres_rewrite.passes.join_slices import join_slices
from attnres_rewrite.passes.normalize_adds import normalize_adds
from attnres_rewrite.passes.plan_blocks import plan_blocks
from attnres_rewrite.passes.relax_checks import relax_checks
from attnres_rewrite.passes.relax_views import relax_views
from attnres_rewrite.passes.schedule_reads import schedule_reads
from attnres_rewrite.records import BlockPlan, Captured, FusedRead, ReadGroup, StreamSearch
from attnres_rewrite.report import RewriteReport, VerifyReport, describe_stream, report_from
from attnres_rewrite.sizes_of_one import refuse_other_sizes_of_one
from attnres_rewrite.verify import prove, prove_capture

Model = nn.Module | ExportedProgram | fx.GraphModule
Progress = Callable[[str], None]
DEFAULTS = AttnResConfig()


def rewrite(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    config: AttnResConfig = DEFAULTS,
    dynamic_shapes: Any = None,
    *,
    share_parameters: bool = True,
    verify: bool = True,
    progress: Progress | None = None,
) -> RewrittenModule:
    """Replace the residual stream of `model` by Attention Residuals (arXiv 2603.15031), and prove it.

    Every state of the stream is replaced, for what reads it, by a softmax-weighted mix of the embedding, the
    finished block sums and the open partial sum. New queries are zero: the result computes what `model` does,
    unless the config has a recency bias and no gate.

    Args:
        model: An nn.Module, a torch.export.ExportedProgram, or a torch.fx.GraphModule from any tracer. It is
            not changed.
        args: Positional example inputs, as `model` takes them.
        kwargs: Example inputs given by name.
        config: Blocks, output form and parameters; see `AttnResConfig`.
        dynamic_shapes: As torch.export takes it; None keeps batch and sequence dynamic where the model allows;
            {} fixes every shape, which halves the time.
        share_parameters: Use the model's own Parameter and buffer objects; False copies them.
        verify: Run the proofs of `attnres_rewrite.verify` on the example inputs; a failed one raises.
        progress: Called with the name of each stage as it starts.

    Returns:
        A torch.fx.GraphModule with the signature, outputs and state-dict keys of `model`, plus the queries and
        gains [D] of the reads. Its `report` says what was found, planned and proved.

    Raises:
        RewriteError: A refusal, with the reason and the place; see attnres_rewrite.errors.
        ValueError: `config` does not fit the model.
        TypeError: An argument is of another kind.
    """
    check_inputs_given(args, kwargs)
    check_config(config)
    say = progress or (lambda stage: None)
    inputs = ExampleInputs(*plain_inputs((tuple(args), dict(kwargs or {}))))
    captured = capture(model, inputs.args, inputs.kwargs, dynamic_shapes, progress=progress)
    warn_of_lost_reads(model)
    if isinstance(model, nn.Module):
        captured = refuse_other_sizes_of_one(model, captured, inputs)
    say("find the stream, plan the blocks, insert and schedule the reads")
    start = time.perf_counter()
    planned = _plan_modes(captured, config)
    own = planned[id(captured.programs[captured.training])]
    tree = captured.programs[captured.training]
    if not share_parameters:
        tree = _with_copied_parameters(captured)
    add_parameters(tree, own.plans, config)
    inserted = {key: insert_planned(found, config) for key, found in planned.items()}
    programs = {mode: inserted[id(program)].program for mode, program in captured.programs.items()}
    seconds = time.perf_counter() - start
    report = _report(model, config, captured, own, inserted[id(own.program)], seconds)
    new = RewrittenModule(tree, programs, captured.training, config, report, inputs)
    if verify:
        faithful = prove_capture(model, new, inputs, say) if isinstance(model, nn.Module) else VerifyReport(())
        with unnoted():
            proved = prove(new, inputs, say)
        both = VerifyReport((*faithful.proofs, *proved.proofs), (*faithful.notes, *proved.notes))
        new.report = replace(report, verify=both)
        require_proofs(new.report.verify)
    return new


def inspect(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    config: AttnResConfig = DEFAULTS,
    dynamic_shapes: Any = None,
    *,
    progress: Progress | None = None,
) -> RewriteReport:
    """Find the streams of `model` in its own mode and plan their blocks; change nothing, prove nothing.

    Takes and raises what `rewrite` does. A model on the meta device is captured with fixed shapes, in half the time.
    """
    check_inputs_given(args, kwargs)
    check_config(config)
    say = progress or (lambda stage: None)
    args, kwargs = plain_inputs((tuple(args), dict(kwargs or {})))
    if dynamic_shapes is None and _is_meta(model):
        dynamic_shapes = {}  # a program of meta tensors never runs
    captured = capture(model, args, kwargs, dynamic_shapes, both_modes=False, progress=progress)
    warn_of_lost_reads(model)
    say("find the stream, plan the blocks, schedule the reads")
    start = time.perf_counter()
    own = plan_program(captured.programs[captured.training], config)
    return report_plans(model, config, captured, own, start)


def report_plans(
    model: Model, config: AttnResConfig, captured: Captured, own: "Planned", start: float | None = None
) -> RewriteReport:
    """Rewrite the captured program and say what became of it; the model is not changed."""
    begun = time.perf_counter() if start is None else start
    add_parameters(own.program, own.plans, config)
    inserted = insert_planned(own, config)
    return _report(model, config, captured, own, inserted, time.perf_counter() - begun)


def verify(
    new: RewrittenModule,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    progress: Progress | None = None,
) -> VerifyReport:
    """Run the two proofs on a rewritten model, whatever its parameters are now; it is not changed.

    Args:
        new: The result of `rewrite` or `load`.
        args: Inputs to run on, as `new` takes them; None with no kwargs means those it was captured on.
        kwargs: Inputs given by name.
        progress: Called with the name of each proof as it starts.

    Returns:
        The figures; `passed` says whether every proof holds. Nothing is raised for one that fails.

    Raises:
        TypeError: `new` is not rewritten, or an argument is of another kind.
    """
    require_rewritten(new, "verify")
    check_inputs_given(() if args is None else args, kwargs)
    given = args is not None or kwargs is not None
    inputs = ExampleInputs(tuple(args or ()), dict(kwargs or {})) if given else new.example_inputs
    with unnoted():
        return prove(new, inputs, progress or (lambda stage: None))


@dataclass(frozen=True, slots=True)
class Planned:
    """One captured program, what was found in it, and what will be inserted."""

    program: fx.GraphModule
    search: StreamSearch
    plans: tuple[BlockPlan, ...]


def plan_program(program: fx.GraphModule, config: AttnResConfig) -> Planned:
    """Run the passes up to the plan; additions and views are spelled anew, nothing else changes."""
    normalize_adds(program)
    join_slices(program.graph)
    search = find_stream(program)
    refuse_mixed_grad_modes(program.graph, search.streams)
    relax_views(program)
    return Planned(program, search, plan_blocks(program.graph, search.streams, config))


def _plan_modes(captured: Captured, config: AttnResConfig) -> dict[int, Planned]:
    """Plan every program, by its id; all modes must agree, so that parameters can be shared.

    Raises:
        ModeMismatchError: They do not.
    """
    own_program = captured.programs[captured.training]
    own = plan_program(own_program, config)
    planned = {id(own_program): own}
    for program in captured.programs.values():
        if id(program) not in planned:
            try:
                other = plan_program(program, config)
            except NoStreamError as why:
                raise _mode_mismatch(captured.training, own, str(why)) from why
            if _outline(own.plans) != _outline(other.plans):
                found = [len(plan.stream.updates) for plan in other.plans]
                raise _mode_mismatch(captured.training, own, f"Updates found in the other mode: {found}.")
            planned[id(program)] = other
    return planned


def _mode_mismatch(training: bool, own: Planned, difference: str) -> ModeMismatchError:
    found = [len(plan.stream.updates) for plan in own.plans]
    return ModeMismatchError(
        explain(
            "train mode and eval mode have different streams",
            own.plans[0].reads[0].source_line or None,
            f"Updates found in {'train' if training else 'eval'} mode: {found}. {difference}",
            "A dropout on the sum itself, or layers skipped at random, make that; apply them to the branch.",
        )
    )


def _outline(plans: Sequence[BlockPlan]) -> list[tuple[Any, ...]]:
    """Return what parameters depend on: the blocks, the reads and their widths."""
    return [(plan.blocks, plan.stream.width, [(read.state, read.name) for read in plan.reads]) for plan in plans]


@dataclass(frozen=True, slots=True)
class Inserted:
    """One rewritten program, and how its reads are computed."""

    program: Program
    groups: tuple[ReadGroup, ...]
    fused: tuple[FusedRead, ...]


def insert_planned(planned: Planned, config: AttnResConfig) -> Inserted:
    """Rewrite the program; keep a copy of its graph, with the plans on it, for the proofs."""
    original, copies = copy_graph(planned.program.graph)
    kept = tuple(map_plan(plan, copies) for plan in planned.plans)
    groups, fused = put_reads_in(planned.program, planned.plans, config)
    return Inserted(Program(planned.program.graph, original, kept), groups, fused)


def put_reads_in(
    program: fx.GraphModule, plans: Sequence[BlockPlan], config: AttnResConfig
) -> tuple[tuple[ReadGroup, ...], tuple[FusedRead, ...]]:
    """Run the passes behind the plan: the graph of `program` is rewritten, its code is not generated anew."""
    insert_reads(program.graph, plans, config)
    groups = schedule_reads(program.graph, config.schedule)
    fused = fuse_reads(program.graph)
    relax_checks(program.graph)
    return groups, fused


def _report(
    model: Model, config: AttnResConfig, captured: Captured, own: Planned, inserted: Inserted, seconds: float
) -> RewriteReport:
    reasons = [(*_kernels(plan), _why_no_direct_kernel(config)) for plan in own.plans]
    streams = [
        describe_stream(plan, inserted.groups, inserted.fused, *why)
        for plan, why in zip(own.plans, reasons, strict=True)
    ]
    return report_from(_name_of(model), config, captured, streams, own.search.left_alone, seconds)


def _kernels(plan: BlockPlan) -> tuple[str, str | None]:
    """Return the name of the kernels that run the reads, and why they do not, or None."""
    root = tensor_of(plan.stream.root)
    assert root is not None
    most = max((read.num_sources for read in plan.reads), default=0)
    return kernels_of(root.device), why_no_kernel(root.device, plan.stream.dtype, most, plan.stream.width)


def _why_no_direct_kernel(config: AttnResConfig) -> str | None:
    reason = why_no_variant_kernel(config.num_heads, config.key_rank, config.recency_bias)
    return f"{reason}, and no two-phase form" if reason and config.only_direct else reason


def _with_copied_parameters(captured: Captured) -> fx.GraphModule:
    memo: dict[int, Any] = {}
    for program in captured.programs.values():
        for table in ("_parameters", "_buffers", "_modules"):
            program.__dict__[table] = copy.deepcopy(program.__dict__[table], memo)
    return captured.programs[captured.training]


def _is_meta(model: Model) -> bool:
    return isinstance(model, nn.Module) and any(parameter.is_meta for parameter in model.parameters())


def _name_of(model: Model) -> str:
    if isinstance(model, ExportedProgram):
        return "ExportedProgram"
    return type(model).__name__.removesuffix("Impl")


def require_proofs(report: VerifyReport | None) -> None:
    """Raise ProofError when a proof failed."""
    if report is None or report.passed:
        return
    failed = [proof for proof in report.proofs if not proof.passed]
    seen = "\n  ".join(
        f"{proof.name} ({proof.mode}, {proof.dtype}): outputs {proof.output_error:.1e}, "
        f"gradients {proof.gradient_error if proof.gradient_error is None else format(proof.gradient_error, '.1e')}, "
        f"limit {proof.limit:.0e}"
        for proof in failed
    )
    raise ProofError(
        explain(
            f"{len(failed)} of {len(report.proofs)} proofs failed, so the rewrite is not handed out",
            None,
            seen,
            "Please report the model: this is a bug, or an operation that is not deterministic.",
        )
    )
