"""Mirrors attnres_rewrite/passes/chains.py: which operand of an add is the stream."""

import pytest
import torch
from torch import Tensor, nn

from attnres_rewrite.errors import NoStreamError
from tests.networks import Gpt
from tests.passes.test_find_stream import search


class Averaged(Gpt):
    """The head reads a weighted sum of the outputs of every `each`-th update."""

    def __init__(self, each: int) -> None:
        super().__init__(3)
        self.each, self.weights = each, nn.Parameter(torch.rand(7))

    def forward(self, ids: Tensor) -> Tensor:
        states = [self.embed(ids)]
        for layer in self.layers:
            states.append(states[-1] + layer.attn(layer.norm_1(states[-1])))
            states.append(states[-1] + layer.mlp(layer.norm_2(states[-1])))
        chosen = states[:: self.each]
        total = self.weights[0] * chosen[0]
        for weight, state in zip(self.weights[1:], chosen[1:], strict=False):
            total = total + weight * state
        return self.head(self.norm(total))


def test_a_weighted_sum_of_states_is_not_taken_for_the_stream():
    (stream,) = search(Averaged(each=2)).streams
    assert [update.kind for update in stream.updates] == ["residual"] * 6 + ["parallel"]
    # the last state goes into the sum, which is read
    assert [bool(readers) for readers in stream.readers] == [True] * 6 + [False, True]


def test_a_sum_of_all_states_leaves_no_stream_and_says_why():
    with pytest.raises(NoStreamError, match="a recurrence, or a weighted sum of all of them"):
        search(Averaged(each=1))
