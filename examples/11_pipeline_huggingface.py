"""Train a rewritten Llama as a pipeline with block caching: 2 processes, 2 stages each.

torchrun --nproc-per-node 2 examples/11_pipeline_huggingface.py        started plainly, it starts torchrun itself
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_rewrite as ar

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
STEPS, MICROBATCHES, BATCH, LENGTH, VOCAB = 10, 4, 2, 16, 128


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train() -> None:
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # one for each process here
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    # Every rank builds the same model and plan, and keeps its own stages of it.
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SMALL))
    example = {"input_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long), "use_cache": False}
    new = ar.rewrite(model, (), example, ar.AttnResConfig(num_blocks=4), dynamic_shapes={}, verify=False)
    plan = ar.partition(new, num_ranks=2, num_virtual=2, cuts="blocks")
    pipeline = ar.build_pipeline(plan, n_microbatches=MICROBATCHES, device=device, loss_fn=loss_of)
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=3e-3)
    ids = torch.randint(0, VOCAB, (MICROBATCHES * BATCH, LENGTH)).to(device)
    history: list[float] = []
    for _ in range(STEPS):
        losses: list[Tensor] = []
        optimizer.zero_grad()
        pipeline.step(*((ids,) if dist.get_rank() == 0 else ()), target=ids, losses=losses)
        pipeline.reduce_tied_gradients()
        pipeline.clip_grad_norm_(1.0)
        optimizer.step()
        history.append(sum(loss.item() for loss in losses) / MICROBATCHES)
    if pipeline.stages[-1].is_last:
        sent = {mode: traffic.total_units for mode, traffic in plan.traffic.items()}
        print(f"loss {history[0]:.2f} -> {history[-1]:.2f} in {STEPS} steps; tensors sent a microbatch: {sent}")
        assert history[-1] < history[0]
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        train()
    else:
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", __file__], check=True)
