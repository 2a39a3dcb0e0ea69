"""Choose the layer to draw: a plan -> consecutive updates that one layer makes.

The first layer behind the first that reads the root, a finished block and a partial sum shows all a rewrite does, with
few lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from attnres_rewrite.fxgraph import owner_of
from attnres_rewrite.records import BlockPlan, ReadPlan

MOST_UPDATES = 6
ENOUGH_SOURCES = 3


@dataclass(frozen=True, slots=True)
class Layer:
    """Updates `first` to `last` of a stream, counted from 1; it reads the states first - 1 to last - 1."""

    name: str  # FQN of its module, or "" where no one module makes the updates
    first: int
    last: int

    @property
    def title(self) -> str:
        return self.name or f"updates {self.first} to {self.last}"


def choose_layer(plan: BlockPlan) -> Layer:
    """Return the layer of a stream that is worth a picture."""
    layers = _layers_of(plan)
    later = layers[1:] or layers
    # a skip between two layers makes an update of no layer
    for layer in sorted(later, key=lambda layer: not layer.name):
        if max((read.num_sources for read in reads_of(plan, layer)), default=0) >= ENOUGH_SOURCES:
            return layer
    return later[0]


def reads_of(plan: BlockPlan, layer: Layer) -> tuple[ReadPlan, ...]:
    """Return the reads of the states that the layer's own updates are worked out from."""
    return tuple(read for read in plan.reads if layer.first - 1 <= read.state < layer.last)


def _layers_of(plan: BlockPlan) -> Sequence[Layer]:
    numbered = enumerate((numbered_module(owner_of(update.add)) for update in plan.stream.updates), start=1)
    layers: list[Layer] = []
    for name, run in groupby(numbered, key=lambda pair: pair[1]):
        states = [state for state, _ in run]
        if name and len(states) <= MOST_UPDATES:
            layers.append(Layer(name, states[0], states[-1]))
            continue
        layers += [Layer("", pair[0], pair[-1]) for pair in zip(*[iter(states)] * 2, strict=False)]
        if len(states) % 2:
            layers.append(Layer("", states[-1], states[-1]))
    return layers


def numbered_module(fqn: str) -> str:
    """Return the part of a name up to its last number: "model.layers.3.mlp" -> "model.layers.3"; "" without one."""
    parts = fqn.split(".")
    last = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])
