"""The figures of a tapped graph, batch after batch -> their sums over all batches, in float64 on the CPU."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres_rewrite.taps import Figure, TappedGraph


@dataclass(frozen=True, slots=True)
class Measured:
    """One batch: sums of squares [tensors], of gradients [updates], and moments over tokens [columns of all reads]."""

    loss: float
    elements: Tensor
    squares: Tensor
    gradients: Tensor
    tokens: Tensor  # behind each column
    means: Tensor
    deviations: Tensor  # sums of squared deviations from the means

    @property
    def is_finite(self) -> bool:
        figures = (self.squares, self.gradients, self.means, self.deviations)
        return math.isfinite(self.loss) and all(bool(figure.isfinite().all()) for figure in figures)


class Side:
    """One network, the rewritten one or the original, and the sums of what it gave so far."""

    def __init__(self, graph: TappedGraph, device: torch.device) -> None:
        """Take a tapped graph, and the device of its streams."""
        self._graph, self._device = graph, device
        self._squares = [figure for figure in graph.figures if figure.kind != "weights"]
        self._reads = [figure for figure in graph.figures if figure.kind == "weights"]
        self._updates = [figure for figure in graph.figures if figure.kind == "update"]
        self._num_batches = 0
        self._columns: dict[Figure, slice] = {}
        self._sum: Measured | None = None

    def measure(self, leaves: Sequence[Any], loss_of: Callable[[Any], Tensor]) -> Measured:
        """Run flat inputs forward, and backward to the updates; nothing is added up yet."""
        anchors = torch.zeros(len(self._updates), dtype=torch.float64, device=self._device, requires_grad=True)
        with torch.enable_grad():
            outputs, figures = self._graph.run(leaves, anchors)
            loss = loss_of(outputs)
            # an update that the loss does not depend on has a gradient of zero
            (gradients,) = torch.autograd.grad(loss, [anchors], materialize_grads=True)
        return self._gathered(loss.detach(), figures, gradients)

    def _gathered(self, loss: Tensor, figures: Sequence[tuple[Any, ...]], gradients: Tensor) -> Measured:
        """Bring all figures to the CPU at once."""
        rows = [found for figure, found in zip(self._graph.figures, figures, strict=True) if figure.kind != "weights"]
        moments = [
            found for figure, found in zip(self._graph.figures, figures, strict=True) if figure.kind == "weights"
        ]
        widths = [len(found[1]) for found in moments]
        ends = [sum(widths[: number + 1]) for number in range(len(widths))]
        self._columns = {
            read: slice(end - width, end) for read, end, width in zip(self._reads, ends, widths, strict=True)
        }
        parts = [loss.double().reshape(1), *(found[1].reshape(1) for found in rows), gradients]
        parts += [found[part] for part in (1, 2) for found in moments]
        flat = torch.cat([part.to(self._device) for part in parts]).cpu()
        sizes = [1, len(rows), len(gradients), sum(widths), sum(widths)]
        first, squares, grads, means, deviations = flat.split(sizes)
        elements = torch.tensor([found[0] for found in rows], dtype=torch.float64, device="cpu")
        tokens = torch.tensor([found[0] for found in moments], dtype=torch.float64, device="cpu")
        tokens = tokens.repeat_interleave(torch.tensor(widths, dtype=torch.int64, device="cpu"))
        return Measured(float(first), elements, squares, grads, tokens, means, deviations)

    def add(self, batch: Measured) -> None:
        """Add up a batch; means and deviations as Chan, Golub and LeVeque (1983) do, which keeps their digits."""
        self._num_batches += 1
        before = self._sum
        if before is None:
            self._sum = batch
            return
        tokens = before.tokens + batch.tokens
        step = batch.means - before.means
        self._sum = Measured(
            before.loss + batch.loss,
            before.elements + batch.elements,
            before.squares + batch.squares,
            before.gradients + batch.gradients,
            tokens,
            before.means + step * batch.tokens / tokens,
            before.deviations + batch.deviations + step.square() * before.tokens * batch.tokens / tokens,
        )

    @property
    def _total(self) -> Measured:
        assert self._sum is not None
        return self._sum

    @property
    def mean_loss(self) -> float:
        """The mean over batches."""
        return self._total.loss / self._num_batches

    def elements(self, figure: Figure) -> int:
        """Return the number of elements of all tensors of a figure."""
        return int(self._total.elements[self._squares.index(figure)])

    def rms(self, figure: Figure) -> float:
        """Return the root of the mean square of all elements."""
        at = self._squares.index(figure)
        return math.sqrt(self._total.squares[at] / self._total.elements[at])

    def gradient_norm(self, update: Figure, width: int) -> float:
        """Return the root of the mean over tokens of the squared norm of the gradient of an update."""
        return math.sqrt(self._total.gradients[self._updates.index(update)] / (self.elements(update) / width))

    def moments(self, read: Figure) -> tuple[list[float], list[float]]:
        """Return the means and the standard deviations over tokens of the columns of a read."""
        columns = self._columns[read]
        deviations = self._total.deviations[columns] / self._total.tokens[columns]
        return self._total.means[columns].tolist(), deviations.sqrt().tolist()
