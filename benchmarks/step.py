"""Time a rewritten GPT against its original and against Attention Residuals written by hand, all in one run.

    python benchmarks/step.py [--device cpu] [--layers 12] [--width 768] [--tokens 1024] [--batch 1] [--blocks 8]
                              [--dtype bfloat16] [--rounds 20] [--eager] [--variants original auto ...]
                              [--json benchmarks/results/step_cpu.json]

Prints, for a forward pass and for a training step (forward and backward), the median of every variant, and the median
of its ratios to the compiled original, taken round by round: the variants take turns, so a slow moment of the machine
meets them all. Compilation is timed apart, in a process of its own with empty caches each. On a GPU the peak memory of
a step is printed beside it.

Variants: the original; the rewrite under each schedule; `backend`, the model attached and compiled by
backend="attnres"; `naive`, the usual way to write the method, a stack of all sources and two einsums in each read. All
are compiled; --eager adds the original, `auto` and `naive` uncompiled.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import attnres_rewrite as ar  # noqa: E402
from benchmarks.machine import synchronize, write_as_they_come  # noqa: E402
from examples.gpt import GPT, Layer  # noqa: E402

SCHEDULES = ("direct", "two_phase", "auto")
VARIANTS = ("original", *SCHEDULES, "backend", "naive")
COMPILED = ("original", "auto", "backend", "naive")
VOCABULARY = 8192


class NaiveRead(nn.Module):
    """One read as it is usually written: a stack, a norm, two einsums."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, sources: list[Tensor]) -> Tensor:
        values = torch.stack(sources)
        logits = torch.einsum("d,s...d->s...", self.query.to(values.dtype), self.norm(values))
        return torch.einsum("s...,s...d->...d", logits.softmax(0), values)


class NaiveGPT(GPT):
    """examples/gpt.py with Block Attention Residuals written by hand."""

    def __init__(self, *, block_size: int, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.block_size = block_size
        self.reads = nn.ModuleList(NaiveRead(sizes["width"]) for _ in range(2 * len(self.layers)))

    def forward(self, ids: Tensor) -> Tensor:
        sources = [self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))]
        mix = sources[0]
        for number, read in enumerate(self.reads):
            layer = self.layers[number // 2]
            assert isinstance(layer, Layer)
            update = layer.mlp(layer.norm_2(mix)) if number % 2 else layer.attention(layer.norm_1(mix))
            if number % self.block_size:
                sources[-1] = sources[-1] + update
            else:
                sources.append(update)
            mix = read(sources)
        return self.head(self.norm(mix))


def build(variant: str, options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    sizes = {
        "vocab": VOCABULARY,
        "width": options.width,
        "depth": options.layers,
        "heads": options.width // 64,
        "context": options.tokens,
        "dropout": 0.0,
    }
    dtype = getattr(torch, options.dtype)
    ids = torch.randint(0, VOCABULARY, (options.batch, options.tokens), device=options.device)
    if variant == "naive":
        block_size = 2 * options.layers // options.blocks
        return NaiveGPT(block_size=block_size, **sizes).to(options.device, dtype), ids
    model = GPT(**sizes).to(options.device, dtype)
    if variant == "backend":
        ar.attach(model, ar.AttnResConfig(num_blocks=options.blocks), (ids,))
    elif variant != "original":
        config = ar.AttnResConfig(num_blocks=options.blocks, schedule=variant)
        return ar.rewrite(model, (ids,), config=config, verify=False, dynamic_shapes={}), ids
    return model, ids


def compiled(variant: str, model: nn.Module) -> Callable[[Tensor], Tensor]:
    backend = "attnres" if variant == "backend" else "inductor"
    return torch.compile(model, fullgraph=True, dynamic=False, backend=backend)


def steps_of(model: nn.Module, run: Callable[[Tensor], Tensor], ids: Tensor) -> dict[str, Callable[[], None]]:
    def forward() -> None:
        model.eval()
        with torch.no_grad():
            run(ids)

    def train() -> None:
        model.train()
        run(ids).float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return {"forward": forward, "train": train}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each variant and step."""
    steps: dict[str, dict[str, Callable[[], None]]] = {}
    models: dict[str, nn.Module] = {}
    for name in options.variants:
        models[name], ids = build(name, options)
        model = models[name]
        steps[name] = steps_of(model, compiled(name, model), ids)
        if options.eager and name in ("original", "auto", "naive"):
            steps[f"{name}, eager"] = steps_of(model, model, ids)
    for kind in ("forward", "train"):
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for name in steps:
            for _ in range(3):
                steps[name][kind]()
        for _ in range(options.rounds):
            for name in steps:
                seconds[name].append(timed(steps[name][kind], options.device))
        for name, measured in seconds.items():
            ratios = [ours / theirs for ours, theirs in zip(measured, seconds["original"], strict=True)]
            row = {"step": kind, "variant": name, "ms": 1e3 * statistics.median(measured)}
            row |= {"ratio": statistics.median(ratios), "lowest_ms": 1e3 * min(measured)}
            if options.device == "cuda":
                row["peak_mib"] = peak_mib(steps[name][kind], models[name.removesuffix(", eager")])
            print(f"{kind:8} {name:18} {row['ms']:9.2f} ms   x{row['ratio']:.3f}", row.get("peak_mib", ""), flush=True)
            yield row


def timed(step: Callable[[], None], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def peak_mib(step: Callable[[], None], model: nn.Module) -> float:
    """Return the peak of a step, and the model's own parameters: those of the other variants are there as well."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    return (torch.cuda.max_memory_allocated() - before + parameters) / 2**20


def compile_seconds(variant: str, arguments: list[str]) -> float:
    """Compile one variant, forward and backward, in a fresh process with empty caches."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        command = [sys.executable, __file__, *arguments, "--compile-only", variant]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(found.stdout.splitlines()[-1])


def compile_rows(variants: list[str], arguments: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the compile time of each variant, and its ratio to the original's, which comes first."""
    original = 0.0
    for variant in variants:
        seconds = compile_seconds(variant, arguments)
        original = original or seconds
        print(f"compile  {variant:18} {seconds:9.2f} s    x{seconds / original:.3f}", flush=True)
        yield {"step": "compile", "variant": variant, "ms": 1e3 * seconds, "ratio": seconds / original}


def compile_only(variant: str, options: argparse.Namespace) -> None:
    model, ids = build(variant, options)
    step = steps_of(model, compiled(variant, model), ids)["train"]
    print(timed(step, options.device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, default in (
        ("layers", 12),
        ("width", 768),
        ("tokens", 1024),
        ("batch", 1),
        ("blocks", 8),
        ("rounds", 20),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="with the original")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--no-compile-times", action="store_true")
    parser.add_argument("--compile-only", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "original" not in options.variants:
        parser.error("--variants needs the original, which all are compared with")
    if options.compile_only:
        compile_only(options.compile_only, options)
        return
    timed_apart = [] if options.no_compile_times else [name for name in COMPILED if name in options.variants]
    write_as_they_come(options, itertools.chain(measure(options), compile_rows(timed_apart, sys.argv[1:])))


if __name__ == "__main__":
    main()
