"""Time the passes (normalize_adds to insert_reads) against the capture, at 8, 32 and 128 layers of a Llama.

    python benchmarks/passes.py [--layers 8 32 128] [--json benchmarks/results/passes.json]

Prints, for each depth, the median of three runs of capture and passes, the ratio of the two, and the passes'
microseconds a node: a constant one is linear growth. Proofs are not part of it.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import attnres_rewrite as ar
from attnres_rewrite.api import insert_planned, plan_program
from attnres_rewrite.capture import capture
from attnres_rewrite.passes.insert_reads import add_parameters

RUNS = 3


def model_of(layers: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_hidden_layers=layers,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def measure(layers: int) -> dict[str, Any]:
    model, ids = model_of(layers), torch.zeros(2, 16, dtype=torch.long)
    config = ar.AttnResConfig(num_blocks=8)
    captures: list[float] = []
    passes: list[float] = []
    nodes = 0
    for _ in range(RUNS):
        start = time.perf_counter()
        captured = capture(model, (ids,), both_modes=False)
        captures.append(time.perf_counter() - start)
        program = captured.programs[False]
        nodes = len(program.graph.nodes)
        start = time.perf_counter()
        planned = plan_program(program, config)
        add_parameters(program, planned.plans, config)
        insert_planned(planned, config)
        passes.append(time.perf_counter() - start)
        assert len(planned.search.streams[0].updates) == 2 * layers
    capture_s, passes_s = statistics.median(captures), statistics.median(passes)
    return {
        "layers": layers,
        "nodes": nodes,
        "capture_s": round(capture_s, 3),
        "passes_s": round(passes_s, 3),
        "passes_to_capture": round(passes_s / capture_s, 4),
        "passes_us_per_node": round(1e6 * passes_s / nodes, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [measure(layers) for layers in options.layers]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "device": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "runs": RUNS,
            "rows": rows,
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
