"""Mirrors attnres_rewrite/passes/select_chains.py: which chains are the streams of the network."""

import torch
from torch import Tensor, nn

from tests.networks import WIDTH, Gpt, ids
from tests.passes.test_find_stream import search


class Latents(nn.Module):
    """In its layers `at`, a GPT adds what a chain of updates makes of a parameter; the chain reads the stream."""

    def __init__(self, at: tuple[int, ...]) -> None:
        super().__init__()
        self.gpt, self.at = Gpt(3), at
        self.start = nn.Parameter(torch.randn(1, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.gpt.embed(tokens)
        for number, layer in enumerate(self.gpt.layers):
            if number in self.at:
                latent = self.start.expand(x.shape[0], x.shape[1], -1)
                for _ in range(3):
                    latent = latent + layer.mlp(layer.norm_2(latent) + layer.norm_1(x))
                x = x + latent
            x = layer(x)
        return self.gpt.head(self.gpt.norm(x))


def test_a_chain_from_a_parameter_that_begins_and_ends_in_one_branch_is_no_stream():
    for at in ((0,), (1,), (0, 1, 2)):
        (stream,) = search(Latents(at)).streams
        assert len(stream.updates) == 6 + len(at), at


class SharedRoot(nn.Module):
    """Two stacks on one embedding: the first is an output, and feeds the other half way."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Gpt(3), Gpt(2)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = y = self.one.embed(tokens)
        states: list[Tensor] = []
        for layer in self.one.layers:
            x = layer(x)
            states.append(x)
        for number, layer in enumerate(self.other.layers):
            y = layer(y)
            if not number:
                y = y + layer.mlp(self.one.norm(states[0]))
        return self.one.head(self.one.norm(x)), self.other.head(self.other.norm(y))


def test_two_stacks_on_one_embedding_are_two_streams_where_one_ends_in_an_output():
    assert sorted(len(stream.updates) for stream in search(SharedRoot(), ids()).streams) == [5, 6]
