"""Begin to train a model that no process ever holds whole: built without memory, cut, and given its first values.

torchrun --nproc-per-node 2 examples/15_large_models.py        started plainly, it starts torchrun itself
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from gpt import GPT
from torch import Tensor, nn

import attnres_rewrite as ar

MICROBATCHES, BATCH, LENGTH = 4, 2, 16


def init(model: nn.Module) -> None:
    """Initialise the whole model, as anywhere: what this process does not hold takes no memory and no time."""
    for name, module in model.named_modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.005 if name.endswith(("attention.out", "mlp.2")) else 0.02)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train() -> None:
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # one for each process here
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    with torch.device("meta"):  # shapes alone, nothing to prove with: prove the same network with fewer layers
        model, example = GPT(), torch.zeros(BATCH, LENGTH, dtype=torch.long)
    new = ar.rewrite(model, (example,), config=ar.AttnResConfig(num_blocks=4), dynamic_shapes={}, verify=False)
    plan = ar.partition(new, num_ranks=2, num_virtual=2)
    pipeline = ar.build_pipeline(plan, n_microbatches=MICROBATCHES, device=device, loss_fn=loss_of)
    pipeline.initialize(model, init, seed=0)  # this rank's stages; the same numbers however the model is cut

    ids, losses = torch.arange(MICROBATCHES * BATCH * LENGTH, device=device).view(-1, LENGTH), list[Tensor]()
    pipeline.step(*((ids,) if dist.get_rank() == 0 else ()), target=ids, losses=losses)
    own = sum(parameter.numel() for parameter in pipeline.parameters())
    print(
        f"rank {dist.get_rank()} has {own:,} of {sum(parameter.numel() for parameter in new.parameters()):,} parameters"
    )
    if pipeline.stages[-1].is_last:
        print(f"loss {sum(loss.item() for loss in losses) / MICROBATCHES:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        train()
    else:
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", __file__], check=True)
