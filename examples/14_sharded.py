"""Train a rewritten model whose parameters are sharded: two processes on the CPU, and the gradients of one."""

import tempfile

import gpt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import attnres_rewrite as ar

PROCESSES, BATCH = 2, 4


def build() -> tuple[ar.RewrittenModule, Tensor]:
    """Return a rewritten model and a whole batch, the same in every process."""
    torch.manual_seed(0)
    model = gpt.GPT(vocab=32, width=32, depth=4, context=16, dropout=0.0).double()
    ids = torch.randint(0, 32, (BATCH, 16))
    new = ar.rewrite(model, (ids,), config=ar.AttnResConfig(num_blocks=2), verify=False)
    for parameter in ar.attnres_parameters(new):
        nn.init.normal_(parameter)
    return new, ids


def difference(found: DTensor, wanted: Tensor) -> float:
    """Return how far this process' share of a gradient is from the same share of the whole one."""
    share = distribute_tensor(wanted, found.device_mesh, found.placements, src_data_rank=None)
    return max((found.to_local() - share.to_local()).abs().flatten().tolist(), default=0.0)


def work(rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=PROCESSES)

    # Its layers are called again. Each is checkpointed, and keeps its share of its parameters, ...
    new, ids = build()
    model, mesh = ar.unflatten(new, "layers.*"), init_device_mesh("cpu", (PROCESSES,))
    for name, layer in model.layers.named_children():
        setattr(model.layers, name, fully_shard(checkpoint_wrapper(layer), mesh=mesh))
    fully_shard(model, mesh=mesh)
    model(ids.chunk(PROCESSES)[rank]).square().mean().backward()

    # ... and the gradients of its shares are those of one process that has all of them.
    for share in ids.chunk(PROCESSES):
        (new(share).square().mean() / PROCESSES).backward()
    found = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    error = max(difference(found[name], p.grad) for name, p in new.named_parameters())
    assert error < 1e-12, error
    print(f"process {rank}: its shares of {len(found)} gradients are those of one process to {error:.0e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, args=(f"file://{folder}/store",), nprocs=PROCESSES)
