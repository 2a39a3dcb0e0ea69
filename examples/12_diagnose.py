"""Train a GPT and its rewrite on counting, then look inside: what reads look at, how large updates are."""

import tempfile

import gpt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnres_rewrite as ar
from attnres_rewrite import plots

STEPS, BATCH, LENGTH, VOCAB = 60, 16, 24, 32


def batch(generator: torch.Generator) -> Tensor:
    """Draw ids [batch, length] that count up by 1, 2 or 3 from anywhere, modulo the vocabulary."""
    start = torch.randint(0, VOCAB, (BATCH, 1), generator=generator)
    step = torch.randint(1, 4, (BATCH, 1), generator=generator)
    return (start + step * torch.arange(LENGTH)) % VOCAB


def train(model: nn.Module) -> None:
    """Train on the same batches, whatever the model."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(STEPS):
        ids = batch(generator)
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def main() -> None:
    torch.manual_seed(0)
    twin = gpt.GPT(vocab=VOCAB, width=64, depth=3, context=LENGTH, dropout=0.0)
    ids = batch(torch.Generator().manual_seed(1))
    new = ar.rewrite(twin, (ids,), config=ar.AttnResConfig(num_blocks=3), share_parameters=False)
    train(new)
    train(twin)

    held_out = torch.Generator().manual_seed(2)
    found = ar.diagnose(new, (batch(held_out) for _ in range(4)), baseline=twin)
    print(f"loss {found.loss:.3f}, of the twin without Attention Residuals {found.baseline_loss:.3f}")
    for read in found.streams[0].reads:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(read.sources, read.weights, strict=True))
        print(f"state {read.state}, before {read.before or 'the head'}: {weights}")
    with tempfile.TemporaryDirectory() as folder:
        files = plots.save_plots(found, folder, formats=("png",))
        print(", ".join(path.name for path in files))


if __name__ == "__main__":
    main()
