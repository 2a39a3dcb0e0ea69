"""Time all that the method adds to a block of a network, beside public kernels, in one run.

    python benchmarks/block.py [--device cpu] [--sources 8] [--sublayers 24] [--tokens 8192] [--width 7168]
                               [--dtype bfloat16] [--rounds 10] [--variants flash-attn-res ...]
                               [--json benchmarks/results/block_cpu.json]

A block of Q sub-layers has N finished sources in front of it. Each of its sub-layers reads them and the block's partial
sum, and norms what it reads; each update is added to the partial sum. The updates are given here, in place of attention
and MLPs: what is timed is reads, adds and norms, forward, and forward with backward to every source, update and
parameter. Each row: the median time a sub-layer, the rows of D (u) that a copy moves in this time on the same machine,
and how far outputs and gradients are from ours; on a GPU how long launching takes, too: where that is as long, the
kernels wait for it.

Variants: `attnres-rewrite`, the operations in which the passes write a block, C++ on a CPU and Triton on a GPU; `by
hand`, a stack and two einsums in each read, which Inductor compiles; on a GPU each public kernel that is installed. One
that is missing or fails is a row that says so.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnres_rewrite import functional as F  # noqa: E402
from benchmarks import peers  # noqa: E402
from benchmarks.machine import write_as_they_come  # noqa: E402
from benchmarks.timing import copy_bandwidth, launch_seconds_of, seconds_of  # noqa: E402

EPS = peers.EPS
OURS, BY_HAND, FLASH = "attnres-rewrite", "by hand", "flash-attn-res"
ON_A_GPU = (*peers.READS, FLASH)


class Inputs:
    """Random tensors: N finished sources, also as one stack; for each sub-layer an update, a query and two norms."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        dtype = getattr(torch, options.dtype)
        make = lambda *size: torch.randn(*size, device=options.device)  # noqa: E731
        rows = lambda count: [make(options.tokens, options.width).to(dtype).requires_grad_() for _ in range(count)]  # noqa: E731
        count = range(options.sublayers)
        self.finished, self.updates, (self.grad,) = rows(options.sources), rows(options.sublayers), rows(1)
        self.stacked = torch.stack([source.detach() for source in self.finished]).requires_grad_()
        self.queries = [(make(options.width) * options.width**-0.5).requires_grad_() for _ in count]
        self.gains = [make(options.width).requires_grad_() for _ in count]
        self.weights = [make(options.width).to(dtype).requires_grad_() for _ in count]

    def leaves(self, stacked: bool) -> list[Tensor]:
        """Return what gradients are taken of, the sources first."""
        sources = [self.stacked] if stacked else self.finished
        return [*sources, *self.updates, *self.queries, *self.gains, *self.weights]


def ours(inputs: Inputs) -> list[Tensor]:
    """Return the input of each sub-layer, and the block's sum."""
    outs, lses = F.inter_block(inputs.finished, inputs.queries, inputs.gains, EPS)
    normed, partial = [peers.rms_norm(outs[0], inputs.weights[0])], inputs.updates[0]
    of_sublayers = list(zip(outs, lses, inputs.queries, inputs.gains, inputs.weights, strict=True))
    for number, (out, lse, query, gain, weight) in enumerate(of_sublayers[1:], 1):
        update = inputs.updates[number - 1] if number > 1 else None
        partial, mix = F.add_merge_norm(partial, update, out, lse, query, gain, weight, None, EPS, EPS)
        normed.append(mix)
    return [*normed, partial + inputs.updates[-1] if len(normed) > 1 else partial]


def by_reads(inputs: Inputs, read: peers.Read) -> list[Tensor]:
    """Return the same, each sub-layer with a read of its own."""
    normed: list[Tensor] = []
    partial: list[Tensor] = []
    for update, query, gain, weight in zip(inputs.updates, inputs.queries, inputs.gains, inputs.weights, strict=True):
        normed.append(read([*inputs.finished, *partial], query, gain, weight))
        partial = [partial[0] + update] if partial else [update]
    return [*normed, *partial]


def by_phases(inputs: Inputs, phase_1: peers.Phase1, phase_2: peers.Phase2) -> list[Tensor]:
    """Return the same, the finished sources read once for all sub-layers."""
    outs, lses = phase_1(inputs.stacked, inputs.queries, inputs.gains)
    normed, partial = [peers.rms_norm(outs[0].reshape(inputs.grad.shape), inputs.weights[0])], inputs.updates[0]
    for number in range(1, len(inputs.updates)):
        mix = phase_2(partial, inputs.queries[number], inputs.gains[number], outs[number], lses[number])
        normed.append(peers.rms_norm(mix, inputs.weights[number]))
        partial = partial + inputs.updates[number]
    return [*normed, partial]


def read_by_hand(sources: Sequence[Tensor], query: Tensor, gain: Tensor, weight: Tensor | None) -> Tensor:
    """Read as it is usually written."""
    values = torch.stack(list(sources))
    keys = peers.rms_norm(values, gain.to(values.dtype))
    weights = torch.einsum("d,s...d->s...", query.to(values.dtype), keys).softmax(0)
    return peers.rms_norm(torch.einsum("s...,s...d->...d", weights, values), weight)


def variants(inputs: Inputs, device: str) -> dict[str, Callable[[], Callable[[], list[Tensor]]]]:
    """Return what makes each variant; making a peer may fail."""

    def own() -> Callable[[], list[Tensor]]:
        # without a compiler the operations are plain PyTorch on a CPU
        return torch.compile(lambda: ours(inputs), dynamic=False) if device == "cpu" else lambda: ours(inputs)

    def of_reads(make: Callable[[], peers.Read]) -> Callable[[], Callable[[], list[Tensor]]]:
        def variant() -> Callable[[], list[Tensor]]:
            read = make()
            return lambda: by_reads(inputs, read)

        return variant

    def of_phases() -> Callable[[], list[Tensor]]:
        phases = peers.flash_attn_res()
        return lambda: by_phases(inputs, *phases)

    found = {OURS: own, BY_HAND: of_reads(lambda: torch.compile(read_by_hand, dynamic=False))}
    if device == "cuda":
        found |= {name: of_reads(make) for name, make in peers.READS.items()} | {FLASH: of_phases}
    return found


def backward(outs: list[Tensor], inputs: Inputs, stacked: bool) -> tuple[Tensor, ...]:
    """Return the gradient of every leaf."""
    return torch.autograd.grad(outs, inputs.leaves(stacked), [inputs.grad] * len(outs))


def gradients(outs: list[Tensor], inputs: Inputs, stacked: bool) -> list[Tensor]:
    """Return those of the sources as one stack, of updates and of parameters."""
    found = backward(outs, inputs, stacked)
    count = 1 if stacked else len(inputs.finished)
    return [found[0] if stacked else torch.stack(found[:count]), *found[count:]]


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the norm of all differences, as a share of the norm of what is wanted."""
    pairs = list(zip(found, wanted, strict=True))
    parts = [torch.stack([part.float().norm() for part in (a - b, b)]) for a, b in pairs if b.numel()]
    lost, whole = torch.stack(parts).square().sum(0).sqrt().tolist()
    return lost / whole


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for the copy and for each variant."""
    inputs = Inputs(options)
    copy = copy_bandwidth(options.rounds, options.device)
    row_bytes = inputs.grad.nbytes
    print(f"copy {copy / 1e9:.0f} GB/s; u is {1e6 * row_bytes / copy:.1f} us")
    yield {"variant": "copy", "gb_per_s": copy / 1e9}
    wanted: tuple[list[Tensor], list[Tensor]] | None = None
    times: dict[str, float] = {}
    for name, make in variants(inputs, options.device).items():
        if name not in (OURS, *options.variants):
            continue
        stacked = name == FLASH
        try:
            run = make()
            outs = run()
            found = ([out.detach() for out in outs], gradients(outs, inputs, stacked))
            wanted = wanted or found
            row: dict[str, Any] = {"variant": name}
            row |= dict(zip(("outputs_differ", "gradients_differ"), map(difference, found, wanted), strict=True))
            del outs, found
            kinds = {
                "forward": without_gradients(run),
                "forward + backward": lambda run=run, stacked=stacked: backward(run(), inputs, stacked),
            }
            for kind, operation in kinds.items():
                seconds = seconds_of(operation, options.rounds, options.device) / options.sublayers
                times.setdefault(kind, seconds)
                row[kind] = {
                    "us": 1e6 * seconds,
                    "u": seconds * copy / row_bytes,
                    "ratio_to_ours": seconds / times[kind],
                }
                if options.device == "cuda":
                    launching = launch_seconds_of(operation, options.rounds, options.device)
                    row[kind]["launch_us"] = 1e6 * launching / options.sublayers
        except Exception as why:  # a peer that is missing, or does not take these sizes, does not end the others
            if name == OURS:
                raise
            row = {"variant": name, "not_run": f"{type(why).__name__}: {(str(why).splitlines() or [''])[0]}"}
        print(line(row), flush=True)
        yield row


def without_gradients(run: Callable[[], list[Tensor]]) -> Callable[[], None]:
    def operation() -> None:
        with torch.no_grad():
            run()

    return operation


def line(row: dict[str, Any]) -> str:
    if "not_run" in row:
        return f"{row['variant']:16} not run: {row['not_run']}"
    parts = [
        f"{kind} {row[kind]['us']:8.0f} us {row[kind]['u']:6.1f} u x{row[kind]['ratio_to_ours']:.2f}"
        + (f" (launches take {row[kind]['launch_us']:.0f} us)" if "launch_us" in row[kind] else "")
        for kind in ("forward", "forward + backward")
    ]
    differs = f"differs by {row['outputs_differ']:.1e}, gradients {row['gradients_differ']:.1e}"
    return f"{row['variant']:16} {'   '.join(parts)}   {differs}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, default in (("sources", 8), ("sublayers", 24), ("tokens", 8192), ("width", 7168), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    others = (BY_HAND, *ON_A_GPU)
    parser.add_argument("--variants", nargs="+", choices=others, default=list(others), help="timed beside ours")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    write_as_they_come(options, measure(options))


if __name__ == "__main__":
    main()
