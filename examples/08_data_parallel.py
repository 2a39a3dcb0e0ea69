"""Train an attached model with DistributedDataParallel: two processes on the CPU, and the gradients of one."""

import tempfile

import gpt
import torch
import torch.distributed as dist
from torch import Tensor, nn

import attnres_rewrite as ar

PROCESSES, BATCH = 2, 4


def build() -> tuple[gpt.GPT, Tensor]:
    """Return an attached model in float64 and a whole batch, the same in every process."""
    torch.manual_seed(0)
    model = gpt.GPT(vocab=32, width=32, depth=2, context=16, dropout=0.0).double()
    ids = torch.randint(0, 32, (BATCH, 16))
    ar.attach(model, ar.AttnResConfig(num_blocks=2), args=(ids,))
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    model.compile(backend="attnres")
    return model, ids


def work(rank: int, address: str) -> None:
    # torch would cut the graph where a bucket of gradients is full, and the stream with it
    torch._dynamo.config.optimize_ddp = False
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=PROCESSES)

    # Each process sees its share of the batch, and the gradients are averaged, ...
    model, ids = build()
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(ids.chunk(PROCESSES)[rank]).square().mean().backward()

    # ... as if one process saw the whole batch, share after share.
    alone, ids = build()
    for share in ids.chunk(PROCESSES):
        (alone(share).square().mean() / PROCESSES).backward()
    pairs = [(mine.grad, other.grad) for mine, other in zip(model.parameters(), alone.parameters(), strict=True)]
    error = max((mine - other).abs().max().item() for mine, other in pairs)
    assert error < 1e-12, f"process {rank}: {error}"
    if rank == 0:
        print(f"{len(pairs)} gradients of {PROCESSES} processes differ from those of one by {error:.0e}")
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, args=(f"file://{folder}/store",), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
