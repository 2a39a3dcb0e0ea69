"""diagnose(): a rewritten network and batches -> where its reads look, the size of its updates, their gradients.

Each batch is run once through the rewritten graph and once through the original, forward and backward to the updates
alone. Sums are added up in float64, so that memory does not grow with the number of batches.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from attnres_rewrite.baseline import own_values, twin_values
from attnres_rewrite.batches import Loss, inputs_of, loss_of, naming_batch
from attnres_rewrite.copying import copy_graph, map_plan
from attnres_rewrite.diagnosis import MAX_LISTED, Diagnosis, ReadDiagnosis, StreamDiagnosis, UpdateDiagnosis
from attnres_rewrite.errors import NotRewrittenError, explain
from attnres_rewrite.example_values import program_with_values
from attnres_rewrite.fxgraph import tensor_of
from attnres_rewrite.inputs import flat_inputs
from attnres_rewrite.module import ModalModule, Program, RewrittenModule
from attnres_rewrite.passes.insert_reads import insert_reads
from attnres_rewrite.records import BlockPlan, ReadPlan
from attnres_rewrite.running_figures import Side
from attnres_rewrite.sublayers import Sublayer, kind_before, sublayers_of
from attnres_rewrite.taps import Figure, returning, tap_original, tap_rewrite, weigh_reads

Baseline = nn.Module | Mapping[str, Tensor] | Literal[False] | None
Progress = Callable[[int, int | None], None]


def diagnose(
    new: RewrittenModule,
    batches: Iterable[Any],
    *,
    loss_fn: Loss | None = None,
    baseline: Baseline = None,
    max_batches: int | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Look into a rewritten network: depth-attention weights, magnitudes and gradients, beside the original.

    The formulas are those of `attnres_rewrite.diagnosis`. The network runs in the mode it is in, dropout included: call
    `new.eval()` first for figures that do not depend on chance. Parameters, buffers, gradients and mode stay as they
    are. One batch is held at a time.

    Args:
        new: The result of `rewrite` or `load`.
        batches: Each a tensor, a tuple or list of positional inputs, or a mapping of inputs by name, on the device of
            the network. "labels" that the network does not take are kept for the loss.
        loss_fn: (outputs, batch) -> a tensor of one element. None: the outputs' own `loss`; else the next-token
            cross-entropy of logits [B, T, V] and of labels [B, T], or of input_ids, or the first integers [B, T].
            Labels beside decoder_input_ids are not shifted.
        baseline: What the original network is run with: None for the parameters of `new`; a state dict, or the module,
            of a twin that was trained without the rewrite; False to leave it out, in half the time.
        max_batches: Stop after so many.
        progress: Called after each batch with the number done, and of all or at most, or None where it is not known.

    Returns:
        The figures. A batch whose loss, or any figure, is not finite is counted and left out of all means.

    Raises:
        NotRewrittenError: `new` is no rewrite.
        CheckpointError: `baseline` has other names or shapes than the original.
        ValueError: There is no batch, no loss, or a wrong argument.
        TypeError: A batch has other inputs than the network.
    """
    program = _program_of(new)
    _check_arguments(batches, max_batches, loss_fn)
    sides = _sides(new, program, baseline)
    examples = flat_inputs(program.original, new.example_inputs.args, new.example_inputs.kwargs)
    counted = _run_all(itertools.islice(batches, max_batches), program.original, sides, loss_fn, examples)
    total = _number_of(batches, max_batches)
    num_batches, nonfinite = 0, 0
    listed: list[int] = []
    for finite in counted:
        if not finite:
            nonfinite += 1
            listed += [num_batches] if len(listed) < MAX_LISTED else []
        num_batches += 1
        if progress is not None:
            progress(num_batches, total)
    if not num_batches:
        raise ValueError("there is no batch to look at: the iterable is empty, or was used up before")
    any_finite = nonfinite < num_batches
    return Diagnosis(
        model=new.report.model,
        mode="train" if new.training else "eval",
        num_batches=num_batches,
        num_nonfinite=nonfinite,
        nonfinite_batches=tuple(listed),
        loss=sides[0].mean_loss if any_finite else None,
        baseline="" if baseline is False else "own" if baseline is None else "given",
        baseline_loss=sides[1].mean_loss if any_finite and len(sides) > 1 else None,
        streams=tuple(_stream(index, plan, sides) for index, plan in enumerate(program.plans)) if any_finite else (),
        config=new.config,
        loss_kind="default" if loss_fn is None else "given",
    )


def depth_weights(new: RewrittenModule, batch: Any) -> dict[str, Tensor]:
    """Return the weights of every read for one batch: what `diagnose` takes the means of.

    Args:
        new: The result of `rewrite` or `load`, in the mode it is to run in.
        batch: As `diagnose` takes it.

    Returns:
        By the name of the read, e.g. "model.layers.3.attn_res.1", its weights [..., S] for every token, float32
        (float64), detached; sources are ordered as in `ReadDiagnosis.sources`.

    Raises:
        NotRewrittenError: `new` is no rewrite.
        TypeError: The batch has other inputs than the network.
    """
    program = _program_of(new)
    graph, copies = copy_graph(program.original)
    insert_reads(graph, [map_plan(plan, copies) for plan in program.plans], new.config)
    reads = weigh_reads(graph)
    values = own_values(new, program.graph, program.original)
    module, _ = returning(graph, [weights for _, _, weights in reads], values)
    with torch.no_grad():
        _, weights = module(*inputs_of(batch, program.original).leaves(program.original))
    return dict(zip((name for name, _, _ in reads), weights, strict=True))


def _check_arguments(batches: object, max_batches: object, loss_fn: object) -> None:
    """Refuse what is of a wrong kind; callers are not all type-checked."""
    if isinstance(batches, Tensor | Mapping | str):
        raise TypeError(f"batches is an iterable of batches, and this {type(batches).__name__} is one: give [batch]")
    # a map-style dataset is iterated by its __getitem__
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TypeError(f"batches is an iterable of batches; got {type(batches).__name__}")
    if max_batches is not None and (isinstance(max_batches, bool) or not isinstance(max_batches, int)):
        raise TypeError(f"max_batches={max_batches!r} must be an integer, or None for all batches")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches={max_batches} must be at least 1, or None for all batches")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn is called as loss_fn(outputs, batch); got {type(loss_fn).__name__}")


def _program_of(new: RewrittenModule) -> Program:
    # callers are not all type-checked
    if not isinstance(new, RewrittenModule):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotRewrittenError(
            explain(
                "there are no reads to look at: the network is not what rewrite() or load() returned",
                None,
                *_what_it_is(new),
            )
        )
    if any(value.is_meta for value in new.parameters()):
        raise ValueError("the parameters are on the meta device, which holds no numbers: nothing can be run")
    return program_with_values(new)


def _what_it_is(other: object) -> tuple[str, str]:
    """Say what was given in the place of a rewrite, and what to do."""
    kind = type(other).__name__
    parts = list(other.modules()) if isinstance(other, nn.Module) else []
    if any(isinstance(part, RewrittenModule) for part in parts):
        return f"This is a {kind} around one.", "Give the RewrittenModule itself: it shares its parameters."
    for name, part in other.named_modules() if isinstance(other, nn.Module) else ():
        # its own: what torch.compile returns passes on the attributes of the model in it
        if vars(part).get("_attnres_facts"):
            why = f"This is a {kind} with reads that attach() added; they run under torch.compile alone."
            attached = f'model.get_submodule("{name}")' if name else "model"
            return (
                why,
                f"Diagnose  attnres_rewrite.as_rewritten({attached}, args, kwargs)  , which has the same parameters.",
            )
    if isinstance(other, ModalModule):
        return f"This is a {kind}.", "Diagnose the rewrite it was made of: new.load_state_dict(model.state_dict())."
    return f"This is a {kind}.", "Add  new = attnres_rewrite.rewrite(model, args)  and diagnose that."


def _sides(new: RewrittenModule, program: Program, baseline: Baseline) -> list[Side]:
    root = tensor_of(program.plans[0].stream.root)
    assert root is not None
    sides = [Side(tap_rewrite(program, new.config, own_values(new, program.graph, program.original)), root.device)]
    if baseline is not False:
        values = own_values(new, program.original) if baseline is None else twin_values(new, program, baseline)
        sides.append(Side(tap_original(program, values), root.device))
    return sides


def _number_of(batches: Iterable[Any], max_batches: int | None) -> int | None:
    """Return how many batches will be run, at most, or None where nobody says."""
    if not isinstance(batches, Sized):
        return max_batches
    try:
        count = len(batches)
    except TypeError:  # a DataLoader of a stream has a __len__ that raises
        return max_batches
    return count if max_batches is None else min(count, max_batches)


def _run_all(
    batches: Iterator[Any], graph: fx.Graph, sides: Sequence[Side], loss_fn: Loss | None, examples: Sequence[Any]
) -> Iterator[bool]:
    """Run every batch on every side, and say of each whether its figures count."""
    # not a loop over batches: its variable would hold one while the next is made
    for number in itertools.count():
        finite = _run_next(batches, number, graph, sides, loss_fn, examples)
        if finite is None:
            return
        yield finite


def _run_next(
    batches: Iterator[Any],
    number: int,
    graph: fx.Graph,
    sides: Sequence[Side],
    loss_fn: Loss | None,
    examples: Sequence[Any],
) -> bool | None:
    try:
        batch = next(batches)
    except StopIteration:
        return None
    inputs = inputs_of(batch, graph)
    leaves = inputs.leaves(graph)
    with naming_batch(number, leaves, examples):
        measured = [side.measure(leaves, lambda outputs: loss_of(outputs, batch, inputs, loss_fn)) for side in sides]
    finite = all(batch_figures.is_finite for batch_figures in measured)
    if finite:
        for side, batch_figures in zip(sides, measured, strict=True):
            side.add(batch_figures)
    return finite


def _stream(index: int, plan: BlockPlan, sides: Sequence[Side]) -> StreamDiagnosis:
    new, original = sides[0], sides[1] if len(sides) > 1 else None
    width = plan.stream.width
    sublayers = sublayers_of(plan.stream)
    root = Figure("mix", index, 0)
    return StreamDiagnosis(
        name=plan.stream.name,
        width=width,
        num_tokens=new.elements(root) // width,
        blocks=tuple((block.start, block.stop - 1) for block in plan.blocks),
        root_rms=new.rms(root),
        baseline_root_rms=original.rms(root) if original else None,
        reads=tuple(_read(index, plan, read, sublayers, new) for read in plan.reads),
        updates=tuple(
            _update(index, plan, number, sublayer, new, original) for number, sublayer in enumerate(sublayers, start=1)
        ),
    )


def _read(index: int, plan: BlockPlan, read: ReadPlan, sublayers: Sequence[Sublayer], new: Side) -> ReadDiagnosis:
    means, spreads = new.moments(Figure("weights", index, read.state))
    *weights, entropy, effective = means
    return ReadDiagnosis(
        name=read.name,
        state=read.state,
        owner=read.owner,
        before=kind_before(read.state, sublayers),
        sources=_sources(plan, read),
        weights=tuple(weights),
        spreads=tuple(spreads[:-2]),
        entropy=entropy,
        effective_sources=effective,
        mix_rms=new.rms(Figure("mix", index, read.state)),
    )


def _sources(plan: BlockPlan, read: ReadPlan) -> tuple[str, ...]:
    """Name the sources of a read, oldest first."""
    begun = [block for block in plan.blocks if block.start <= read.state]
    is_open = read.state < begun[-1].stop - 1
    names = [f"block {number}" for number in range(1, len(begun) + 1 - is_open)]
    return ("embedding", *names, *(["partial"] if is_open else []))


def _update(
    index: int, plan: BlockPlan, number: int, sublayer: Sublayer, new: Side, original: Side | None
) -> UpdateDiagnosis:
    update, summed = Figure("update", index, number), Figure("sum", index, number)
    # the original has no mixes: what reads a state sees the sum
    read = None if sublayer.reads is None else Figure("mix", index, sublayer.reads)
    read_before = Figure("sum", index, read.number) if read and read.number else read
    return UpdateDiagnosis(
        index=number,
        owner=sublayer.owner,
        kind=sublayer.kind,
        block=next(n for n, block in enumerate(plan.blocks, start=1) if number in block),
        reads=sublayer.reads,
        output_rms=new.rms(update),
        sum_rms=new.rms(summed),
        input_rms=new.rms(read) if read else None,
        gradient_norm=new.gradient_norm(update, plan.stream.width),
        baseline_output_rms=original.rms(update) if original else None,
        baseline_sum_rms=original.rms(summed) if original else None,
        baseline_input_rms=original.rms(read_before) if original and read_before else None,
        baseline_gradient_norm=original.gradient_norm(update, plan.stream.width) if original else None,
    )
