"""Train a rewritten GPT from its zero queries, where it starts as the original, on counting."""

import gpt
import torch
from torch import Tensor
from torch.nn import functional as F

import attnres_rewrite as ar

STEPS, BATCH, LENGTH, VOCAB = 60, 16, 24, 32


def batch(generator: torch.Generator) -> Tensor:
    """Draw ids [batch, length] that count up by 1, 2 or 3 from anywhere, modulo the vocabulary."""
    start = torch.randint(0, VOCAB, (BATCH, 1), generator=generator)
    step = torch.randint(1, 4, (BATCH, 1), generator=generator)
    return (start + step * torch.arange(LENGTH)) % VOCAB


def main() -> None:
    torch.manual_seed(0)
    model = gpt.GPT(vocab=VOCAB, width=64, depth=3, context=LENGTH, dropout=0.0).train()
    generator = torch.Generator().manual_seed(0)
    new = ar.rewrite(model, (batch(generator)[:, :-1],), config=ar.AttnResConfig(num_blocks=3)).train()

    queries = [p for name, p in new.named_parameters() if name.endswith(".query")]
    assert all(not query.any() for query in queries), "a rewrite starts at zero queries"
    optimizer = torch.optim.AdamW(new.parameters(), lr=3e-3)
    first = last = 0.0
    for step in range(STEPS):
        ids = batch(generator)
        loss = F.cross_entropy(new(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()

    norms = ", ".join(f"{query.norm():.2f}" for query in queries)
    print(f"loss {first:.2f} -> {last:.2f} in {STEPS} steps; the queries moved to norms {norms}")
    assert last < first
    assert all(query.any() for query in queries)


if __name__ == "__main__":
    main()
