"""Prove a rewrite, on the spot and on any model.

1. original      at zero queries the rewritten graph gives the outputs of the original graph, and the gradients of all
                 original parameters. output="sum": to rounding. output="mean": to rounding with the norms' eps gone.
                 With gate=True at zero gates instead, for random queries. With a recency bias and no gate the bias is
                 left out, the proof is called "original, bias 0", and a note says how far off the outputs are with it.
2. independent   at random queries and gains it gives what DepthInterpreter evaluates over the original graph: outputs
                 and every gradient, those of queries, gains and gates included.
0. capture       the original graph gives the outputs of the module itself, and the gradients of its parameters, in the
                 module's own precision and mode.

1 and 2 run in float64 for every mode that was captured, random numbers from one seed.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_rewrite.config import dtype_name
from attnres_rewrite.errors import CaptureError, ProofError, explain
from attnres_rewrite.inputs import flat_inputs
from attnres_rewrite.lifted import LiftedInterpreter, LiftedState, override, seeded
from attnres_rewrite.model_state import buffers_kept, plain_tensors_kept
from attnres_rewrite.module import ExampleInputs, Program, RewrittenModule
from attnres_rewrite.report import Proof, VerifyReport
from attnres_rewrite.witness import DepthInterpreter, random_reads, zero_gates, zero_queries

FLOAT64_LIMIT = 1e-10
FLOAT32_LIMIT = 1e-5  # where an op has no float64 kernel
CAPTURE_LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}

Say = Callable[[str], None]
Run = tuple[list[Any], list[Tensor | None]]  # flat outputs, gradients


def prove(new: RewrittenModule, inputs: ExampleInputs, say: Say) -> VerifyReport:
    """Run both proofs in every captured mode; `new` is not changed.

    Raises:
        CaptureError: The inputs or parameters are on the meta device, which holds no numbers.
        ProofError: The float64 copies would not fit into the machine's memory.
    """
    _refuse_meta(new, inputs)
    _refuse_too_large(new)
    proofs: list[Proof] = []
    notes: dict[str, None] = {}
    done: list[Program] = []
    for mode, program in sorted(new.programs.items()):
        name = "train" if mode else "eval"
        if any(program.graph is other.graph for other in done):
            continue
        done.append(program)
        leaves = flat_inputs(program.original, inputs.args, inputs.kwargs)
        state = LiftedState(new, (program.graph, program.original))
        say(f"prove: equal to the original at zero {'gates' if new.config.gate else 'queries'} ({name})")
        proofs.append(_prove_original(new, program, name, state, leaves, notes))
        say(f"prove: equal to the formula at random queries ({name})")
        proofs.append(_prove_independent(new, program, name, state, leaves, notes))
    return VerifyReport(tuple(proofs), tuple(notes))


def _refuse_meta(new: RewrittenModule, inputs: ExampleInputs) -> None:
    values = [*new.parameters(), *pytree.tree_leaves((inputs.args, inputs.kwargs))]
    if any(isinstance(value, Tensor) and value.is_meta for value in values):
        raise CaptureError(
            explain(
                "nothing can be proven on the meta device: it holds no numbers",
                None,
                "The model or its inputs are meta tensors.",
                "Use inspect, or verify=False, and verify where the weights are.",
            )
        )


def _refuse_too_large(new: RewrittenModule) -> None:
    """Raise ProofError rather than run out of memory: parameters, two sets of gradients, and what backward keeps."""
    needed = 4 * 8 * sum(parameter.numel() for parameter in new.parameters())
    device = next(new.parameters()).device
    where, there = (
        ("this machine", _memory_of_machine()) if device.type != "cuda" else (str(device), _memory_of(device))
    )
    if needed > there:
        raise ProofError(
            explain(
                f"the proofs, in float64, need about {needed / 2**30:.0f} GiB; {where} has {there / 2**30:.0f}",
                None,
                "A proof is about the graph, not about its size.",
                "Prove the same architecture with fewer layers, and rewrite this one with verify=False (--no-verify).",
            )
        )


def _memory_of_machine() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def _prove_original(
    new: RewrittenModule,
    program: Program,
    mode: str,
    state: LiftedState,
    leaves: Sequence[Any],
    notes: dict[str, None],
) -> Proof:
    without_eps = new.config.output == "mean"
    neutral = (zero_gates if new.config.gate else zero_queries)(program.plans, state.parameters)
    original = LiftedInterpreter(program.original, state, without_eps)
    starts_as_original = new.config.starts_as_original
    rewritten = LiftedInterpreter(
        program.graph, override(state, neutral), without_eps, without_bias=not starts_as_original
    )
    added = {id(value) for name, value in state.parameters.items() if name in _added_names(program)}
    wanted = [leaf for leaf in state.leaves() if id(leaf) not in added]
    reference = _run(original, leaves, wanted)
    found = _run(rewritten, leaves, wanted)
    if not starts_as_original:
        with torch.no_grad():
            biased = LiftedInterpreter(program.graph, override(state, neutral)).run_lifted(leaves)[0]
            plain = LiftedInterpreter(program.original, state).run_lifted(leaves)[0]
        notes[_biased_note(new, mode, relative_error(plain, biased))] = None
    name = "original" if starts_as_original else "original, bias 0"
    return _compare(name, mode, reference, found, original.float32_ops | rewritten.float32_ops, notes)


def _biased_note(new: RewrittenModule, mode: str, error: float) -> str:
    return (
        f"{mode}: the rewritten network does NOT start as the original: at zero queries recency_bias="
        f"{new.config.recency_bias} puts its outputs off by {error:.1e}, relative; the proof leaves the bias out"
    )


def _added_names(program: Program) -> set[str]:
    return {
        f"{read.name}.{leaf}" for plan in program.plans for read in plan.reads for leaf in ("query", "key_norm", "gate")
    }


def _prove_independent(
    new: RewrittenModule,
    program: Program,
    mode: str,
    state: LiftedState,
    leaves: Sequence[Any],
    notes: dict[str, None],
) -> Proof:
    random = override(state, random_reads(program.plans, state.parameters, seed=1, num_heads=new.config.num_heads))
    witness = DepthInterpreter(program.original, random, program.plans, new.config)
    rewritten = LiftedInterpreter(program.graph, random)
    wanted = random.leaves()
    reference = _run(witness, leaves, wanted)
    found = _run(rewritten, leaves, wanted)
    with torch.no_grad():
        plain = LiftedInterpreter(program.original, state).run_lifted(leaves)[0]
    if relative_error(plain, reference[0]) < 1e-6:
        notes[f"{mode}: the outputs hardly depend on the queries, so the second proof says little"] = None
    return _compare("independent", mode, reference, found, witness.float32_ops | rewritten.float32_ops, notes)


def _run(interpreter: LiftedInterpreter, leaves: Sequence[Any], wanted: Sequence[Tensor]) -> Run:
    """Run forward, and backward from one fixed random weighting of all floating outputs."""
    return _with_gradients(lambda: interpreter.run_lifted(leaves)[0], wanted)


def _with_gradients(forward: Callable[[], Sequence[Any]], wanted: Sequence[Tensor]) -> Run:
    outputs, loss = _outputs_and_loss(forward)
    return outputs, _gradients(loss, wanted)


def _outputs_and_loss(forward: Callable[[], Sequence[Any]]) -> tuple[list[Any], Tensor | None]:
    with torch.enable_grad():
        outputs = forward()
        noise = torch.Generator().manual_seed(2)
        loss: Tensor | None = None
        for value in outputs:
            if isinstance(value, Tensor) and value.dtype.is_floating_point:
                weight = torch.randn(value.shape, generator=noise, dtype=torch.float64, device="cpu").to(value)
                if value.requires_grad:
                    finite = torch.where(torch.isfinite(value), value, torch.zeros_like(value))
                    term = (finite * weight).sum()
                    loss = term if loss is None else loss + term
    return [value.detach() if isinstance(value, Tensor) else value for value in outputs], loss


def _gradients(loss: Tensor | None, wanted: Sequence[Tensor]) -> list[Tensor | None]:
    if loss is None or not wanted:
        return [None] * len(wanted)
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))


def _compare(name: str, mode: str, reference: Run, found: Run, float32_ops: set[str], notes: dict[str, None]) -> Proof:
    num_gradients = sum(gradient is not None for gradient in reference[1])
    for what, values in (("outputs", reference[0]), ("gradients", reference[1])):
        _refuse_no_number(what, values)
    if float32_ops:
        notes[f"no float64 kernel, run in float32: {', '.join(sorted(float32_ops))}"] = None
    if not num_gradients:
        notes[f"{mode}: no output is differentiable, so no gradient was compared"] = None
    return Proof(
        name=name,
        mode=mode,
        dtype="float64",
        output_error=relative_error(reference[0], found[0]),
        gradient_error=relative_error(*_as_zeros(reference[1], found[1])) if num_gradients else None,
        num_outputs=sum(isinstance(value, Tensor) for value in reference[0]),
        num_gradients=num_gradients,
        limit=FLOAT32_LIMIT if float32_ops else FLOAT64_LIMIT,
    )


def _refuse_no_number(what: str, values: Sequence[Any]) -> None:
    """Raise ProofError when all of `values` is NaN or infinite: any two networks would be equal."""
    floats = [value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.numel()]
    if floats and not any(bool(torch.isfinite(value).any()) for value in floats):
        raise ProofError(
            explain(
                f"nothing can be proven: the {what} of the original hold no finite number",
                None,
                "A parameter or an example input is NaN or infinite, or a mask hides every token.",
                "Give other example inputs, or look where the first NaN comes from.",
            )
        )


def _as_zeros(reference: list[Tensor | None], found: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Drop the gradients that neither run has; one that only one run has is compared with zeros."""
    pairs = [
        (left, right) for left, right in zip(reference, found, strict=True) if left is not None or right is not None
    ]
    lefts = [left if left is not None else torch.zeros_like(right) for left, right in pairs]  # type: ignore[arg-type]
    rights = [right if right is not None else torch.zeros_like(left) for left, right in pairs]  # type: ignore[arg-type]
    return lefts, rights


def relative_error(reference: Sequence[Any], found: Sequence[Any]) -> float:
    """Return the largest difference of any tensor, relative to that tensor's largest value.

    A tensor below a thousandth of the largest one is measured against that thousandth: its own values may be
    rounding already (the gradient of a key bias is zero in theory). Anything that is not a floating tensor must
    be equal, and what is not finite must be so at the same places; else the error is infinite.
    """
    if len(reference) != len(found):
        return float("inf")
    worst = 0.0
    largest = max((_largest(value) for value in reference), default=0.0)
    for left, right in zip(reference, found, strict=True):
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            same = left == right
        elif left.shape != right.shape or left.dtype != right.dtype:
            same = False
        elif not left.dtype.is_floating_point:
            same = torch.equal(left, right)
        else:
            finite = torch.isfinite(left)
            same = bool((finite == torch.isfinite(right)).all())
            scale = max(_largest(left), 1e-3 * largest)
            difference = torch.where(finite, left - right, torch.zeros_like(left)).abs()
            error = float(difference.max()) if difference.numel() else 0.0
            worst = max(worst, error / scale if scale else error)
        if not same:
            return float("inf")
    return worst


def _largest(value: Any) -> float:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point or not value.numel():
        return 0.0
    return float(torch.where(torch.isfinite(value), value, torch.zeros_like(value)).abs().max())


def prove_capture(model: nn.Module, new: RewrittenModule, inputs: ExampleInputs, say: Say) -> VerifyReport:
    """Compare the captured graph of the model's own mode with the model, forward and backward, in its own precision.

    Random numbers come from one seed. Buffers that the forward updates (batch norm) are put back. A model that has no
    backward (it writes in place over what that needs) has a note, and no gradients to compare.

    Raises:
        ProofError: The outputs are the model's, and the gradients are not.
    """
    _refuse_meta(new, inputs)
    say("prove: the capture is faithful")
    program = new.programs[new.training]
    leaves = flat_inputs(program.original, inputs.args, inputs.kwargs)
    tensors = (*model.parameters(), *model.buffers(), *leaves)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    args, kwargs = pytree.tree_map(_cloned, (inputs.args, inputs.kwargs))
    own, captured = ([dict(owner.named_parameters())[name] for name in trained] for owner in (model, new))
    # a batch norm needs its statistics for the backward, so they are put back after it
    with seeded(tensors, 0), buffers_kept(model), plain_tensors_kept(model):
        outputs, loss = _outputs_and_loss(lambda: pytree.tree_leaves(model(*args, **kwargs)))
        try:
            reference, notes = (outputs, _gradients(loss, own)), ()
        except RuntimeError as why:
            first_line = str(why).partition("\n")[0]
            notes = (f"the model itself has no backward, so the capture was compared forward only: {first_line}",)
            reference, captured = (outputs, []), []
    runner = torch.fx.Interpreter(new, graph=program.original)
    given = list(map(_cloned, leaves))
    with seeded(tensors, 0), buffers_kept(new):
        found = _with_gradients(lambda: pytree.tree_leaves(runner.run(*given, enable_io_processing=False)), captured)
    dtype = next(
        (value.dtype for value in reference[0] if isinstance(value, Tensor) and value.dtype in CAPTURE_LIMITS),
        torch.float32,
    )
    compared = sum(gradient is not None for gradient in reference[1])
    proof = Proof(
        name="capture",
        mode="train" if new.training else "eval",
        dtype=dtype_name(dtype),
        output_error=relative_error(reference[0], found[0]),
        gradient_error=relative_error(*_as_zeros(reference[1], found[1])) if compared else None,
        num_outputs=sum(isinstance(value, Tensor) for value in reference[0]),
        num_gradients=compared,
        limit=CAPTURE_LIMITS[dtype],
    )
    if proof.output_error <= proof.limit and not proof.passed:
        raise _lost_gradients(proof, trained, reference[1], found[1])
    return VerifyReport((proof,), notes)


def _lost_gradients(
    proof: Proof, names: Sequence[str], reference: Sequence[Tensor | None], found: Sequence[Tensor | None]
) -> ProofError:
    """Say what torch.export loses of a backward, and which parameters notice."""
    errors = {
        name: relative_error(*_as_zeros([left], [right]))
        for name, left, right in zip(names, reference, found, strict=True)
    }
    wrong = sorted((name for name, error in errors.items() if error > proof.limit), key=errors.__getitem__)
    return ProofError(
        explain(
            f"the captured graph does not give the model's gradients ({proof.gradient_error:.1e}, relative)",
            f"{wrong[-1]} and {len(wrong) - 1} more parameters" if wrong else None,
            "torch.export keeps the forward only: the backward of a torch.autograd.Function, and hooks on gradients "
            "(Tensor.register_hook, Module.register_full_backward_hook) are no part of its graph. A tensor that the "
            "model made of a parameter in an earlier call and kept has lost its gradients, too.",
            "Write them as tensor operations, or the function as a torch.library.custom_op with register_autograd.",
        )
    )


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
