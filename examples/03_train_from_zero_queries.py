"""Train a rewritten GPT from its zero queries, where it starts as the original, on a copying task."""

import gpt
import torch
from torch import Tensor
from torch.nn import functional as F

import attnres_rewrite as ar

STEPS, BATCH, LENGTH = 60, 16, 16


def batch(generator: torch.Generator) -> Tensor:
    """Draw ids [batch, 2 * length] whose second half repeats the first."""
    half = torch.randint(0, 32, (BATCH, LENGTH), generator=generator)
    return torch.cat((half, half), dim=1)


def main() -> None:
    torch.manual_seed(0)
    model = gpt.GPT(vocab=32, width=64, depth=4, context=2 * LENGTH, dropout=0.0).train()
    generator = torch.Generator().manual_seed(0)
    new = ar.rewrite(model, (batch(generator)[:, :-1],), config=ar.AttnResConfig(num_blocks=4)).train()

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
