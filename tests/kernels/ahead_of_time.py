"""Compile every kernel, as it is launched, for GPUs that are not here; print registers, stack and widths of loads.

    python -m tests.kernels.ahead_of_time [--arch 80,90,100] [--width 768,...] [--operation read] [--jobs 2]
                                          [--table docs/kernels.md] [--from RESULT.jsonl] [--forms all]
                                          [--many 64,256]

The operations run on CPU tensors with a driver that names another target, and each launch compiles instead of running:
what is measured is the very configuration that is shipped. One JSON line for each kernel; --table writes them as a
page, --from reads lines printed before instead of compiling. --forms compiles, in place of these, every operation on
rows of each form that the library takes, and prints a line for each; --many phase 1 of many sources, with the shared
memory that each kernel takes. TRITON_INTERPRET must not be set.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from attnres_rewrite.kernels.inter_block import op as inter_block_op
from attnres_rewrite.kernels.merge import op as merge_op
from attnres_rewrite.kernels.read import op as read_op

ARCHS = (80, 90, 100)
WIDTHS = (768, 1024, 4096, 7168)
NUM_SOURCES = (2, 5, 9)
NUM_QUERIES = 6
NUM_TOKENS = 1024
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel of one configuration. Loads and stores are counted in the machine code by their width in bits."""

    kernel: str
    arch: int
    width: int
    num_sources: int
    registers: int
    stack: int
    spills: int
    loads: dict[str, int]
    stores: dict[str, int]
    num_warps: int
    operation: str


class _OtherDriver:
    """A driver for a GPU that is not here: enough of one to compile."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compiled_for(arch: int, operation: Callable[[], Any]) -> list[Any]:
    """Run an operation on CPU tensors, every launch replaced by its compilation; return the kernels."""
    kernels: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(launch(self, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    driver.set_active(_OtherDriver(arch))
    JITFunction.run = compile_only
    for module in (inter_block_op, merge_op, read_op):
        module.is_for_cpp = lambda tensor: False
    try:
        operation()
    finally:
        JITFunction.run = launch
    return kernels


def _rows(*count: int) -> list[Tensor]:
    """Uninitialised bfloat16 rows [T, D]: nothing runs on them."""
    *many, width = count
    return [torch.empty(NUM_TOKENS, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(*many)]


def _parameters(count: int, width: int) -> list[Tensor]:
    return [torch.empty(width, requires_grad=True) for _ in range(count)]


def run_read(width: int, num_sources: int) -> None:
    query, gain = _parameters(2, width)
    out, _ = read_op.read_by_kernel(_rows(num_sources, width), query, gain, 1e-6, "sum")
    out.backward(torch.empty_like(out))


def run_inter_block(width: int, num_sources: int) -> None:
    _mix(_rows(num_sources, width), NUM_QUERIES)


def _mix(sources: list[Tensor], num_queries: int) -> None:
    queries, gains = (_parameters(num_queries, sources[0].shape[-1]) for _ in range(2))
    outs, lses = inter_block_op.inter_block_by_kernel(sources, queries, gains, 1e-6)
    torch.autograd.backward([*outs, *lses], [torch.empty_like(value) for value in (*outs, *lses)])


def run_merge(width: int, num_sources: int) -> None:
    inter_out, partial = _rows(2, width)
    query, gain = _parameters(2, width)
    lse = torch.empty(NUM_TOKENS, requires_grad=True)
    out = merge_op.merge_by_kernel(inter_out, lse, partial, query, gain, 1e-6, float(num_sources))
    out.backward(torch.empty_like(out))


def run_add_merge_norm(width: int, num_sources: int) -> None:
    for norm in ("rms", "layer"):
        inter_out, partial, update = _rows(3, width)
        query, gain, weight, bias = _parameters(4, width)
        lse = torch.empty(NUM_TOKENS, requires_grad=True)
        total, normed = merge_op.add_merge_norm_by_kernel(
            partial, update, inter_out, lse, query, gain, weight, bias if norm == "layer" else None, 1e-6, 1e-6,
            float(num_sources), norm,
        )  # fmt: skip
        torch.autograd.backward([total, normed], [torch.empty_like(total), torch.empty_like(normed)])


OPERATIONS: dict[str, Callable[[int, int], None]] = {
    "read": run_read,
    "inter_block": run_inter_block,
    "merge": run_merge,
    "add_merge_norm": run_add_merge_norm,
}
# a merge has two inputs, whatever the number of sources behind them
SOURCES_OF = {"read": NUM_SOURCES, "inter_block": NUM_SOURCES, "merge": (2,), "add_merge_norm": (2,)}


def measured(case: tuple[str, int, int, int]) -> list[Compiled]:
    """Compile one operation for one architecture, width and number of sources."""
    operation, arch, width, num_sources = case
    kernels = compiled_for(arch, lambda: OPERATIONS[operation](width, num_sources))
    return [_measured(kernel, *case) for kernel in kernels]


def forms() -> dict[str, list[Tensor]]:
    """Return three rows [..., D] of each form: what the interpreter runs, a compiler may still refuse."""
    like = {"dtype": torch.bfloat16}
    plain = lambda *shape, dtype=torch.bfloat16: [torch.empty(*shape, dtype=dtype) for _ in range(2)]  # noqa: E731
    # a stride beyond 32 bits: never written, so it takes no memory
    return {
        "float32, odd width": [torch.empty(70, 7), *plain(70, 7, dtype=torch.float32)],
        "float16": [torch.empty(70, 96, dtype=torch.float16), *plain(70, 96, dtype=torch.float16)],
        "one token of one channel": [torch.empty(1, 1, **like), *plain(1, 1)],
        "three dimensions": [torch.empty(6, 4, 5, 16, **like).transpose(0, 1)[:, :, ::2], *plain(4, 6, 3, 16)],
        "all tokens one row": [torch.empty(16, **like).expand(70, 16), *plain(70, 16)],
        "rows that overlap": [torch.empty(85, **like).unfold(0, 16, 1), *plain(70, 16)],
        "a stride beyond 32 bits": [torch.empty(2, 2**31 + 8, **like)[:, :560].view(2, 35, 16), *plain(2, 35, 16)],
    }


def run_each(rows: list[Tensor]) -> None:
    """Run every operation on these rows, with all that may be there, and its backward."""
    sources = [value.requires_grad_() for value in rows]
    query, gain, weight, bias = _parameters(4, rows[0].shape[-1])
    lse = torch.empty(rows[0].shape[:-1], requires_grad=True)
    first, second, third = sources
    mix, _ = read_op.read_by_kernel(sources, query, gain, 1e-6, "sum")
    outs, lses = inter_block_op.inter_block_by_kernel(sources, [query, query], [gain, gain], 1e-6)
    merged = merge_op.merge_by_kernel(first, lse, second, query, gain, 1e-6, 1.0)
    fused = merge_op.add_merge_norm_by_kernel(
        first, second, third, lse, query, gain, weight, bias, 1e-6, 1e-6, 1.0, "layer"
    )
    results = [mix, *outs, *lses, merged, *fused]
    torch.autograd.backward(results, [torch.empty_like(value) for value in results])


def compile_forms(arch: int, wanted: str) -> None:
    """Compile every operation on rows of one form, or of "all", and print what was compiled."""
    chosen = forms() if wanted == "all" else {wanted: forms()[wanted]}
    for form, rows in chosen.items():
        kernels = [kernel.metadata.name for kernel in compiled_for(arch, lambda rows=rows: run_each(rows))]
        print(json.dumps({"form": form, "kernels": kernels}), flush=True)


def compile_many(arch: int, counts: list[int]) -> None:
    """Compile phase 1 for so many sources, each with as many queries, and print the shared memory of each kernel."""
    for count in counts:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            sources = [torch.empty(NUM_TOKENS, 1024, dtype=dtype, requires_grad=True) for _ in range(count)]
            for kernel in compiled_for(arch, lambda sources=sources: _mix(sources, len(sources))):
                row = {"kernel": kernel.metadata.name, "dtype": str(dtype), "num_sources": count}
                print(json.dumps(row | {"shared_bytes": kernel.metadata.shared}), flush=True)


def _measured(kernel: Any, operation: str, arch: int, width: int, num_sources: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(CUOBJDUMP, "-res-usage", file.name)
        code = _output(CUOBJDUMP, "-sass", file.name)
    return Compiled(
        kernel=kernel.metadata.name,
        arch=arch,
        width=width,
        num_sources=num_sources,
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        stack=int(re.findall(r"STACK:(\d+)", usage)[-1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        loads=_by_width(re.findall(r"\bLDG(?:STS)?\.E[.\w]*", code)),
        stores=_by_width(re.findall(r"\bSTG\.E[.\w]*", code)),
        num_warps=kernel.metadata.num_warps,
        operation=operation,
    )


def _by_width(instructions: list[str]) -> dict[str, int]:
    widths = [next((width for width in ("128", "64", "U16", "U8") if width in name), "32") for name in instructions]
    return {width: widths.count(width) for width in sorted(set(widths))}


def _output(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def cases(operations: list[str], archs: list[int], widths: list[int]) -> Iterator[tuple[str, int, int, int]]:
    for operation in operations:
        for num_sources in SOURCES_OF[operation]:
            for width in widths:
                for arch in archs:
                    yield operation, arch, width, num_sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--arch", type=numbers, default=list(ARCHS))
    parser.add_argument("--width", type=numbers, default=list(WIDTHS))
    parser.add_argument("--operation", action="append", choices=list(OPERATIONS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--from", type=Path, dest="lines")
    parser.add_argument("--forms", help="the name of one, or all")
    parser.add_argument("--many", type=numbers, help="numbers of sources")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.forms:
        compile_forms(options.arch[0], options.forms)
        return
    if options.many:
        compile_many(options.arch[0], options.many)
        return
    rows: list[dict[str, Any]] = []
    if options.lines:
        rows = [json.loads(line) for line in options.lines.read_text().splitlines()]
    else:
        todo = list(cases(options.operation or list(OPERATIONS), options.arch, options.width))
        with get_context("fork").Pool(options.jobs) as pool:
            for found in pool.imap(measured, todo):
                rows += map(asdict, found)
                for kernel in found:
                    print(json.dumps(asdict(kernel)), flush=True)
    if options.table:
        options.table.write_text(page(rows))


def page(rows: list[dict[str, Any]]) -> str:
    """Return the registers of each kernel, the most over the numbers of sources, as a Markdown page."""
    archs, widths = (sorted({row[key] for row in rows}) for key in ("arch", "width"))
    lines = [
        "# Kernels",
        "",
        "What every shipped configuration compiles to, bfloat16 rows, 2, 5 and 9 sources, 6 queries, without a GPU:",
        "`python -m tests.kernels.ahead_of_time --table docs/kernels.md`",
        f"(triton {triton.__version__}). {len(rows)} compilations,",
        f"{sum(row['spills'] > 0 for row in rows)} with spills,",
        f"{sum(row['stack'] > 0 for row in rows)} with a stack,",
        f"{sum('128' not in row['loads'] for row in rows)} without 128-bit loads of rows.",
        "",
        "Registers a thread at D = " + ", ".join(map(str, widths)) + "; warps in brackets.",
        "",
        "| operation | kernel | " + " | ".join(f"sm_{arch}" for arch in archs) + " |",
        "|---" * (len(archs) + 2) + "|",
    ]
    for operation, kernel in dict.fromkeys((row["operation"], row["kernel"]) for row in rows):
        cells: list[str] = []
        for arch in archs:
            own = [row for row in rows if (row["operation"], row["kernel"], row["arch"]) == (operation, kernel, arch)]
            most = [max(row["registers"] for row in own if row["width"] == width) for width in widths]
            warps = sorted({row["num_warps"] for row in own})
            cells.append(", ".join(map(str, most)) + f" ({', '.join(map(str, warps))})")
        lines.append(f"| {operation} | `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
