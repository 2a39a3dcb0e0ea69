"""Save the training of a pipeline, resume it in new processes, and load the checkpoint into the model in one piece."""

import os
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gpt import GPT
from torch import Tensor

import attnres_rewrite as ar

STEPS, MICROBATCHES, SHAPE = 3, 4, (2, 16)


def rewritten() -> ar.RewrittenModule:
    torch.manual_seed(0)
    return ar.rewrite(GPT(), (torch.zeros(SHAPE).long(),), dynamic_shapes={}, verify=False)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(folder: str, begun: int) -> None:
    dist.init_process_group("gloo")
    plan = ar.partition(rewritten(), 2)
    pipeline = ar.build_pipeline(plan, "1F1B", n_microbatches=MICROBATCHES, device="cpu", loss_fn=loss_of)
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=1e-3)
    if begun:
        state = pipeline.state_dict(optimizer)
        dcp.load(state, checkpoint_id=f"{folder}/{begun}")
        pipeline.load_state_dict(state, optimizer)
    pipeline.seed_draws(0, step=begun)  # dropout goes on as well
    ids = torch.arange(MICROBATCHES * SHAPE[0] * SHAPE[1]).reshape(-1, SHAPE[1]) % 7
    for step in range(begun, begun + STEPS):
        losses: list[Tensor] = []
        pipeline.step(*((ids,) if dist.get_rank() == 0 else ()), target=ids, losses=losses)
        pipeline.reduce_tied_gradients()
        optimizer.step()
        optimizer.zero_grad()
        if losses:
            print(f"step {step}: loss {sum(entry.item() for entry in losses) / MICROBATCHES:.4f}", flush=True)
    dcp.save(pipeline.state_dict(optimizer), checkpoint_id=f"{folder}/{begun + STEPS}")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        train(sys.argv[1], int(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            for begun in ("0", f"{STEPS}"):
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", __file__]
                subprocess.run([*torchrun, folder, begun], check=True)
            dcp.load(rewritten().state_dict(), checkpoint_id=f"{folder}/{2 * STEPS}")
