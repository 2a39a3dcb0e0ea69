"""Time the operations of attnres_rewrite.functional, and what public kernels do for the same, in one run.

    python benchmarks/reads.py [--device cpu] [--sources 9] [--queries 24] [--tokens 8192] [--width 7168]
                               [--dtype bfloat16] [--rounds 20] [--json benchmarks/results/reads_cpu.json]

Each row: the median time, the bytes the operation has to move (rows of D read once and written once), the bandwidth
that makes, and its share of a device-to-device copy measured in the same run; on a GPU how long launching took, too.
On a CPU the operations are compiled by Inductor, on a GPU they are the Triton kernels. Peers are timed where they are
installed and take the arguments (flash-attn-res, fast-attnres, fla-core, liger-kernel; a GPU only); one that is missing
or fails is a row that says so. Compared is one read of all sources, forward, and forward with backward.
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

Operation = Callable[[], Any]


class Inputs:
    """Tensors of one size, random."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        shape, dtype = (options.tokens, options.width), getattr(torch, options.dtype)
        make = lambda *size: torch.randn(*size, device=options.device)  # noqa: E731
        self.sources = [make(*shape).to(dtype).requires_grad_() for _ in range(options.sources)]
        self.queries = [(make(options.width) * options.width**-0.5).requires_grad_() for _ in range(options.queries)]
        self.gains = [make(options.width).requires_grad_() for _ in range(options.queries)]
        self.weight = make(options.width).to(dtype).requires_grad_()
        self.update = make(*shape).to(dtype).requires_grad_()
        self.grad = make(*shape).to(dtype)
        self.row_bytes = options.tokens * options.width * self.sources[0].element_size()


def operations(inputs: Inputs, compiled: bool) -> dict[str, tuple[Operation, float]]:
    """Return each operation with the rows of D that it has to move."""
    wrap = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
    finished, partial = inputs.sources[:-1], inputs.sources[-1]
    num_sources, num_queries = len(inputs.sources), len(inputs.queries)
    query, gain, weight = inputs.queries[0], inputs.gains[0], inputs.weight
    read = wrap(lambda: F.attn_res_read(inputs.sources, query, gain))
    phase_1 = wrap(lambda: F.inter_block(finished, inputs.queries, inputs.gains)[0])
    with torch.no_grad():
        (out,), (lse,) = F.inter_block(finished, [query], [gain])
    out, lse = out.detach().requires_grad_(), lse.detach().requires_grad_()
    merge = wrap(lambda: F.merge(out, lse, partial, query, gain))
    fused = wrap(lambda: F.add_merge_norm(partial, inputs.update, out, lse, query, gain, weight, None, 1e-6)[1])
    n, q = num_sources - 1, num_queries
    rows = {
        "read": (read, n + 2, inputs.sources, 2 * (n + 1) + 1),
        "inter_block": (phase_1, n + q, finished, q + 2 * n),
        "merge": (merge, 3, [out, partial], 5),
        "add_merge_norm": (fused, 5, [out, partial, inputs.update], 5),
    }
    found: dict[str, tuple[Operation, float]] = {}
    for name, (operation, forward, wanted, backward) in rows.items():
        found[f"{name}, forward"] = (without_grad(operation), forward)
        found[f"{name}, forward + backward"] = (with_grad(operation, wanted, inputs.grad), forward + backward)
    return found


def without_grad(operation: Operation) -> Operation:
    def run() -> None:
        with torch.no_grad():
            operation()

    return run


def with_grad(operation: Operation, wanted: Sequence[Tensor], grad: Tensor) -> Operation:
    def run() -> None:
        outs = operation()
        outs = outs if isinstance(outs, list) else [outs]
        torch.autograd.grad(outs, wanted, [grad.reshape(outs[0].shape)] * len(outs))

    return run


def peer_reads(inputs: Inputs) -> dict[str, Callable[[], tuple[Operation, Sequence[Tensor]]]]:
    """Return what makes the read of each public kernel, and the tensors whose gradients it gives; that may fail.

    Each is handed its sources as it wants them: a stack is made before the clock starts.
    """
    query, gain = inputs.queries[0], inputs.gains[0]
    stacked = torch.stack([source.detach() for source in inputs.sources]).requires_grad_()

    def of(name: str) -> Callable[[], tuple[Operation, Sequence[Tensor]]]:
        def make() -> tuple[Operation, Sequence[Tensor]]:
            read = peers.READS[name]()
            if name == "liger-kernel":
                return lambda: read(stacked, query, gain, None), [stacked]
            return lambda: read(inputs.sources, query, gain, None), inputs.sources

        return make

    def flash() -> tuple[Operation, Sequence[Tensor]]:
        phase_1, phase_2 = peers.flash_attn_res()

        def read() -> Tensor:
            outs, lses = phase_1(stacked[:-1], [query], [gain])
            return phase_2(stacked[-1], query, gain, outs[0], lses[0])

        return read, [stacked]

    return {name: of(name) for name in peers.READS} | {"flash-attn-res": flash}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for the copy, for each operation, and on a GPU for each peer."""
    inputs = Inputs(options)
    copy = copy_bandwidth(options.rounds, options.device)
    print(f"copy {copy / 1e9:.0f} GB/s")
    yield {"operation": "copy", "gb_per_s": copy / 1e9}
    ours: dict[str, float] = {}
    for name, (operation, moved) in operations(inputs, compiled=options.device == "cpu").items():
        seconds = seconds_of(operation, options.rounds, options.device)
        rate = moved * inputs.row_bytes / seconds
        row = {"operation": name, "us": 1e6 * seconds, "rows": moved, "gb_per_s": rate / 1e9, "of_copy": rate / copy}
        text = f"{name:36} {row['us']:10.0f} us {moved:5} rows {rate / 1e9:7.0f} GB/s  {rate / copy:5.0%} of a copy"
        if options.device == "cuda":
            row["launch_us"] = 1e6 * launch_seconds_of(operation, options.rounds, options.device)
            text += f"   launched in {row['launch_us']:.0f} us"
        print(text, flush=True)
        ours[name] = row["us"]
        yield row
    if options.device == "cuda":
        for name, make in peer_reads(inputs).items():
            yield from peer_rows(name, make, ours, inputs, options)


def peer_rows(
    name: str,
    make: Callable[[], tuple[Operation, Sequence[Tensor]]],
    ours: dict[str, float],
    inputs: Inputs,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time a peer's read, forward and with its backward; one that cannot run is a row that says why."""
    rows: list[dict[str, Any]] = []
    for kind in ("forward", "forward + backward"):
        try:
            operation, wanted = make()
            run = without_grad(operation) if kind == "forward" else with_grad(operation, wanted, inputs.grad)
            microseconds = 1e6 * seconds_of(run, options.rounds, options.device)
        except Exception as why:
            first = str(why).splitlines()[0] if str(why) else ""
            print(f"{name + ', ' + kind:36} not run: {type(why).__name__}: {first}")
            rows.append({"operation": f"{name}, {kind}", "not_run": f"{type(why).__name__}: {first}"})
            continue
        ratio = microseconds / ours[f"read, {kind}"]
        print(f"{name + ', ' + kind:36} {microseconds:10.0f} us   ours is {ratio:.2f} times as fast")
        rows.append({"operation": f"{name}, {kind}", "us": microseconds, "ratio_to_ours": ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, default in (("sources", 9), ("queries", 24), ("tokens", 8192), ("width", 7168), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    write_as_they_come(options, measure(options))


if __name__ == "__main__":
    main()
