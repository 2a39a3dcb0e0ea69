"""Mirrors attnres_rewrite/running_figures.py: sums over batches are those over all tokens at once."""

import pytest
import torch
from torch import Tensor, fx

from attnres_rewrite.running_figures import Side
from attnres_rewrite.taps import Figure, TappedGraph, squares, tap, token_moments

UPDATE, READ = Figure("update", 0, 1), Figure("weights", 0, 1)


class Tapped(torch.nn.Module):
    """Stands in for a graph: one update and one read of four sources."""

    def forward(self, x: Tensor, anchors: Tensor) -> tuple[list[Tensor], list[tuple]]:
        update = tap(x, anchors[0])
        return [update.exp()], [squares(x), token_moments(x.softmax(-1))]


def test_batches_add_up_to_all_tokens():
    side = Side(TappedGraph(fx.GraphModule(Tapped(), fx.Graph()), (UPDATE, READ), None), torch.device("cpu"))
    side._graph.module.forward = Tapped().forward
    batches = [torch.randn(size, 4, dtype=torch.float64) + 5 for size in (3, 1, 70)]
    for batch in batches:
        measured = side.measure([batch], lambda outputs: outputs[0].sum())
        assert measured.is_finite
        side.add(measured)
    everything = torch.cat(batches)
    assert side.elements(UPDATE) == everything.numel()
    assert side.mean_loss == pytest.approx(everything.exp().sum().item() / 3, rel=1e-14)
    assert side.rms(UPDATE) == pytest.approx(everything.square().mean().sqrt().item(), rel=1e-14)
    assert side.gradient_norm(UPDATE, 4) == pytest.approx(everything.exp().square().sum(-1).mean().sqrt().item())
    means, spreads = side.moments(READ)
    weights = everything.softmax(-1)
    assert means[:4] == pytest.approx(weights.mean(0).tolist(), rel=1e-14)
    assert spreads[:4] == pytest.approx(weights.std(0, correction=0).tolist(), rel=1e-12)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_says_so(factor):
    side = Side(TappedGraph(fx.GraphModule(Tapped(), fx.Graph()), (UPDATE, READ), None), torch.device("cpu"))
    side._graph.module.forward = Tapped().forward
    assert not side.measure([torch.ones(2, 4)], lambda outputs: outputs[0].sum() * factor).is_finite
    assert not side.measure([torch.ones(2, 4) * factor], lambda outputs: outputs[0].sum() * 0).is_finite
