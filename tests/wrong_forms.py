"""Block Attention Residuals written by hand, right and with the mistakes of docs/faq.md, on a small float64 network.

    python -m tests.wrong_forms         prints the table of docs/faq.md

Each mistake is one changed line. Its errors are relative: at the queries it starts with against the network without
reads, and at random queries against the rewritten network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.verify import relative_error

VOCAB, WIDTH, UPDATES, SIZE = 31, 64, 8, 3


def branch() -> nn.Module:
    """Return a sub-layer with its own norm; without eps, so that a norm cancels any factor to rounding."""
    hidden = 2 * WIDTH
    return nn.Sequential(nn.RMSNorm(WIDTH, eps=0.0), nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))


class Plain(nn.Module):
    """A pre-norm network without reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.branches = nn.ModuleList(branch() for _ in range(UPDATES))
        self.norm, self.head = nn.RMSNorm(WIDTH, eps=0.0), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for each in self.branches:
            x = x + each(x)
        return self.head(self.norm(x))


def network() -> Plain:
    """Return the network with seeded weights, float64."""
    torch.manual_seed(0)
    return Plain().double().eval()


def normalised(value: Tensor) -> Tensor:
    return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@dataclass(frozen=True)
class Form:
    """What an implementation does at each place where one can go wrong; the defaults are right."""

    size: int = SIZE
    first_partial: Callable[[Tensor], Tensor] = torch.zeros_like  # of the embedding
    reset: bool = True
    states_as_sources: bool = False
    key: Callable[[Tensor], Tensor] = normalised
    value: Callable[[Tensor], Tensor] = lambda source: source
    temperature: float = 1.0
    last: str = "read"
    first_queries: float = 0.0  # their standard deviation at the start

    def run(self, net: Plain, ids: Tensor, queries: Tensor) -> Tensor:
        """Run the network with reads; `queries` are [UPDATES, D], one for each state behind the embedding."""
        embedding = net.embed(ids)
        finished, partial, total, h = [embedding], self.first_partial(embedding), embedding, embedding
        for number, each in enumerate(net.branches, start=1):
            update = each(h)
            partial, total = partial + update, total + update
            newest = total if self.states_as_sources else partial
            h = self.read([*finished, newest], queries[number - 1])
            if number % self.size == 0:
                finished.append(newest)
                partial = torch.zeros_like(partial) if self.reset else partial
        return net.head(net.norm({"read": h, "last block": partial, "running sum": total}[self.last]))

    def read(self, sources: Sequence[Tensor], query: Tensor) -> Tensor:
        """Mix the sources [T, D] by the softmax over them of query . key."""
        logits = torch.stack([self.key(source) @ query for source in sources]) / self.temperature
        values = torch.stack([self.value(source) for source in sources])
        return (logits.softmax(0)[..., None] * values).sum(0)


RIGHT = Form()
WRONG = {
    "embedding counted twice": replace(RIGHT, first_partial=torch.clone),
    "partial sum never reset": replace(RIGHT, reset=False),
    "states used as sources": replace(RIGHT, states_as_sources=True),
    "no final read: the last block": replace(RIGHT, last="last block"),
    "no final read: the running sum": replace(RIGHT, last="running sum"),
    "queries initialised at std 0.02": replace(RIGHT, first_queries=0.02),
    "values normalised": replace(RIGHT, value=normalised),
    "keys not normalised": replace(RIGHT, key=lambda source: source),
    "logits divided by sqrt(d)": replace(RIGHT, temperature=WIDTH**0.5),
    "block size in layers of two": replace(RIGHT, size=2 * SIZE),
}


@dataclass(frozen=True)
class Case:
    """A network, inputs, numbers to make queries of, and what a form is compared with."""

    net: Plain
    ids: Tensor
    drawn: Tensor  # [UPDATES, D]
    queries: Tensor  # the same, for logits of order one
    original: Tensor
    rewritten: Tensor


@cache
def case() -> Case:
    """Return the case, made once: the package rewrites the network, the paper to the letter."""
    net, noise = network(), torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (16,), generator=noise)
    drawn = torch.randn(UPDATES, WIDTH, generator=noise, dtype=torch.float64)
    queries = drawn * WIDTH**-0.5
    config = ar.AttnResConfig(block_size=SIZE, output="mean", key_norm=False)
    new = ar.rewrite(net, (ids,), config=config, dynamic_shapes={}, verify=False)
    with torch.no_grad():
        for read, query in zip(new.report.reads, queries, strict=True):
            new.get_parameter(read.query_name).copy_(query)
        return Case(net, ids, drawn, queries, net(ids), new(ids))


def errors_of(form: Form) -> tuple[float, float]:
    """Return the errors of a form: as it starts, and at random queries."""
    at = case()
    with torch.no_grad():
        start = form.run(at.net, at.ids, form.first_queries * at.drawn)
        random = form.run(at.net, at.ids, at.queries)
    return relative_error([at.original], [start]), relative_error([at.rewritten], [random])


def table() -> list[str]:
    """Return the rows of the table in docs/faq.md."""
    rows = ["| | as it starts | at random queries |", "|---|---|---|"]
    for name, form in ({"right": RIGHT} | WRONG).items():
        rows.append(f"| {name} | {' | '.join(spelled(error) for error in errors_of(form))} |")
    return rows


def spelled(error: float) -> str:
    """Spell an error; what is only rounding depends on the machine."""
    return "rounding" if error < 1e-12 else f"{error:.2f}"


if __name__ == "__main__":
    print("\n".join(table()))
