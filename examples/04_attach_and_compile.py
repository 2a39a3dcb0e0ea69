"""Attach reads to a GPT and compile it: the model stays the object that the training loop holds."""

import gpt
import torch
from torch import Tensor
from torch.nn import functional as F

import attnres_rewrite as ar

STEPS, BATCH, LENGTH, VOCAB = 40, 16, 24, 32


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw ids that count up by 1, 2 or 3 from anywhere, modulo the vocabulary, and the ids that come next."""
    start = torch.randint(0, VOCAB, (BATCH, 1), generator=generator)
    step = torch.randint(1, 4, (BATCH, 1), generator=generator)
    ids = (start + step * torch.arange(LENGTH + 1)) % VOCAB
    return ids[:, :-1], ids[:, 1:]


def loss_of(model: gpt.GPT, ids: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), following.flatten())


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = gpt.GPT(vocab=VOCAB, width=64, depth=2, context=LENGTH, dropout=0.0)
    ids, following = batch(generator)
    before = model(ids)

    ar.attach(model, ar.AttnResConfig(num_blocks=2), args=(ids,))
    model.compile(backend="attnres")
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-5)

    # Weight decay would pull the gains of the keys to zero, and queries want a learning rate of their own.
    reads = ar.attnres_parameters(model)
    rest = [parameter for name, parameter in model.named_parameters() if "attn_res" not in name]
    groups = [{"params": rest}, {"params": reads, "weight_decay": 0.0, "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1)
    first = loss_of(model, ids, following).item()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, *batch(generator)).backward()
        optimizer.step()
    last = loss_of(model, ids, following).item()

    # The same weights without the reads are another network by now.
    with ar.original(model), torch.no_grad():
        without_reads = loss_of(model, ids, following).item()
    print(f"loss {first:.2f} -> {last:.2f} in {STEPS} steps; without its reads the model is at {without_reads:.2f}")
    print(", ".join(f"{count} {what}" for what, count in ar.stats().items()))
    assert last < first
    assert abs(last - without_reads) > 1e-3


if __name__ == "__main__":
    main()
