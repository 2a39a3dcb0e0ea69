"""Time diagnose() against plain forward-backward passes of the same two networks, all in one run.

    python benchmarks/diagnose.py [--device cpu] [--layers 12] [--width 256] [--tokens 256] [--batch 2] [--blocks 8]
                                  [--dtype float32] [--rounds 7] [--json benchmarks/results/diagnose_cpu.json]

A plain pass runs the network eagerly, forward, loss and backward to every parameter. Two pairs take turns, so that a
slow moment of the machine meets both sides of each: the rewrite alone (baseline=False), and with the original beside
it, against a pass of each. The time to tap the graphs is in it. The ratio is the median of the ratios of the rounds;
the target is 1.5.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import synchronize, write_results
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gpt import GPT

import attnres_rewrite as ar

VOCABULARY = 1024
TARGET = 1.5


def build(options: argparse.Namespace) -> tuple[nn.Module, ar.RewrittenModule, list[Tensor]]:
    """Return the original, its rewrite with random queries, and the batches of a round."""
    torch.manual_seed(0)
    model = GPT(
        vocab=VOCABULARY,
        width=options.width,
        depth=options.layers,
        heads=options.width // 64,
        context=options.tokens,
        dropout=0.0,
    ).to(options.device, getattr(torch, options.dtype))
    shape = (options.batch, options.tokens)
    batches = [torch.randint(0, VOCABULARY, shape, device=options.device) for _ in range(options.batches)]
    blocks = options.blocks if options.blocks == "full" else int(options.blocks)
    config = ar.AttnResConfig(num_blocks=blocks)
    new = ar.rewrite(model.eval(), (batches[0],), config=config, verify=False, dynamic_shapes={})
    for parameter in ar.attnres_parameters(new):
        nn.init.normal_(parameter, std=0.1)
    return model, new, batches


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def plain(network: nn.Module, batches: list[Tensor]) -> None:
    """Run forward, loss and backward, as a training step does."""
    for ids in batches:
        loss_of(network(ids), ids).backward()
        for parameter in network.parameters():
            parameter.grad = None


def timed(run: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each pair."""
    model, new, batches = build(options)
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "rewrite": (lambda: plain(new, batches), lambda: ar.diagnose(new, batches, loss_fn=loss_of, baseline=False)),
        "both": (
            lambda: (plain(new, batches), plain(model, batches)),
            lambda: ar.diagnose(new, batches, loss_fn=loss_of),
        ),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for number in range(options.rounds + 1):
        for name, (theirs, ours) in pairs.items():
            both = timed(theirs, options.device), timed(ours, options.device)
            if number:  # the first round warms up
                seconds[name].append(both)
    rows: list[dict[str, Any]] = []
    for name, found in seconds.items():
        ratios = [ours / theirs for theirs, ours in found]
        row = {
            "networks": name,
            "plain_ms": 1e3 * statistics.median(theirs for theirs, _ in found) / len(batches),
            "diagnose_ms": 1e3 * statistics.median(ours for _, ours in found) / len(batches),
            "ratio": statistics.median(ratios),
            "lowest_ratio": min(ratios),
            "highest_ratio": max(ratios),
        }
        rows.append(row)
        spread = f"{row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f}, target {TARGET}"
        times = f"plain {row['plain_ms']:8.1f} ms a batch, diagnose {row['diagnose_ms']:8.1f} ms"
        print(f"{name:8} {times}, x{row['ratio']:.3f} ({spread})", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    sizes = {"layers": 12, "width": 256, "tokens": 256, "batch": 2, "batches": 4, "rounds": 7}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--blocks", default="8", help="a count, or full")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    write_results(options, measure(options))


if __name__ == "__main__":
    main()
