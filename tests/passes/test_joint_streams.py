"""Mirrors attnres_rewrite/passes/joint_streams.py: streams side by side, and what only looks like them."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.errors import ParallelStreamsError
from tests.joint import MmDit, mm_dit
from tests.networks import WIDTH, Attention, Mlp
from tests.passes.test_find_stream import search


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        pytest.param({}, [6, 4], id="the last layer leaves the text as it is"),
        pytest.param({"last": False}, [6, 4], id="the text of the last layer reaches no output"),
        pytest.param({"gated": False, "text_first": False}, [6, 4], id="plain norms, image first"),
        pytest.param({"depth": 2, "single": 2}, [4, 4, 2], id="layers on the tokens of both behind"),
    ],
)
def test_each_side_is_a_stream(options, updates):
    model, inputs = mm_dit(**options)
    assert [len(stream.updates) for stream in search(model, *inputs).streams] == updates


GRID = list(itertools.product((2, 3, 4), (0, 2), (True, False), (True, False), (True, False)))


@pytest.mark.parametrize(("output", "schedule"), [("sum", "direct"), ("mean", "two_phase")])
def test_a_sample_is_proven_in_both_modes(output, schedule):
    _prove(GRID[11:12] if output == "sum" else GRID[32:33], output, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("spec", GRID)
def test_all_are_proven(spec):
    _prove([spec], "sum", "auto")


def _prove(specs, output, schedule):
    for depth, single, last, gated, text_first in specs:
        model, inputs = mm_dit(depth=depth, single=single, last=last, gated=gated, text_first=text_first)
        new = ar.rewrite(model, inputs, config=ar.AttnResConfig(block_size=2, output=output, schedule=schedule))
        assert new.report.verify
        assert {proof.name for proof in new.report.verify.proofs} >= {"original", "independent"}


class ByHand(MmDit):
    """Block Attention Residuals written out: a list of sources for each of two streams, one update a block."""

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        sources = [[self.image_in(image)], [self.text_in(text)]]
        self.at = [0, 0]
        for layer in self.layers:
            image, text = (self.read(stream, sources[stream]) for stream in (0, 1))
            sides, shifts = [layer.image, layer.text], [s.modulate(condition) for s in (layer.image, layer.text)]
            parts = [
                side.qkv(side.norm_1(x) * (1 + scale) + shift)
                for side, x, (shift, scale, *_) in zip(sides, (image, text), shifts, strict=True)
            ]
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in torch.cat(parts[::-1], 1).chunk(3, -1))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            found = mixed.split([text.shape[1], image.shape[1]], 1)[::-1]
            for stream, (side, (_, _, gate, shift, scale, gate_2)) in enumerate(zip(sides, shifts, strict=True)):
                if not side.last:
                    sources[stream].append(gate * side.out(found[stream]))
                    x = side.norm_2(self.read(stream, sources[stream])) * (1 + scale) + shift
                    sources[stream].append(gate_2 * side.mlp(x))
        return self.head(self.norm(self.read(0, sources[0])))

    def read(self, stream: int, sources: list[Tensor]) -> Tensor:
        if len(sources) == 1:
            return sources[0]
        query, gain = self.parameters_of[stream][self.at[stream]]
        self.at[stream] += 1
        keys = torch.stack([F.rms_norm(source, (WIDTH,), gain, 1e-6) for source in sources])
        weights = (keys @ query).softmax(0)
        return len(sources) * (weights.unsqueeze(-1) * torch.stack(sources)).sum(0)


def test_each_stream_reads_its_own_sources():
    model, inputs = mm_dit()
    model, inputs = model.double(), tuple(value.double() for value in inputs)
    new = ar.rewrite(copy.deepcopy(model), inputs, config=ar.AttnResConfig(block_size=1))
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            parameter.add_(torch.randn_like(parameter))
    by_hand = copy.deepcopy(model)
    by_hand.__class__ = ByHand
    names = dict(new.named_parameters())
    by_hand.parameters_of = [
        [(names[read.query_name], names[read.query_name.replace("query", "key_norm")]) for read in stream.reads]
        for stream in new.report.streams
    ]
    torch.testing.assert_close(new(*inputs), by_hand(*inputs), rtol=1e-10, atol=1e-10)


class TwoStreams(nn.Module):
    """a and b are updated in turns; how, a subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(Mlp() for _ in range(8))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(16))
        self.start = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x, self.start(x)
        for i in range(0, 8, 2):
            a, b = self.step(a, b, self.mlps[i : i + 2], self.norms[2 * i : 2 * i + 4])
        return self.norms[0](a) + self.norms[1](b)


class Meeting(TwoStreams):
    def step(self, a, b, mlps, norms):
        return a + mlps[0](norms[0](a) + norms[1](b)), b + mlps[1](norms[2](a) + norms[3](b))


class Reversible(TwoStreams):
    """Each is updated from the other alone."""

    def step(self, a, b, mlps, norms):
        a = a + mlps[0](norms[0](b))
        return a, b + mlps[1](norms[1](a))


class Mixed(TwoStreams):
    """A layer reads a learned mix of both, as one with hyper-connections does."""

    def step(self, a, b, mlps, norms):
        h = mlps[0](norms[0](0.3 * a + 0.7 * b))
        return a + h, b + 0.5 * h


class Unnormed(TwoStreams):
    """One is read as it is."""

    def step(self, a, b, mlps, norms):
        return a + mlps[0](norms[0](a) + b), b + mlps[1](norms[2](a) + norms[3](b))


def test_two_that_meet_in_every_layer_are_two_streams():
    assert [len(stream.updates) for stream in search(Meeting(), torch.randn(2, 5, WIDTH)).streams] == [4, 4]


@pytest.mark.parametrize("network", [Reversible, Mixed, Unnormed])
def test_what_only_exchanges_updates_is_refused(network):
    with pytest.raises(ParallelStreamsError, match="streams exchange updates"):
        search(network(), torch.randn(2, 5, WIDTH))


def test_states_that_are_returned_are_no_streams_side_by_side():
    class Returned(Meeting):
        def forward(self, x: Tensor) -> list[Tensor]:
            a, b, states = x, self.start(x), []
            for i in range(0, 8, 2):
                a, b = self.step(a, b, self.mlps[i : i + 2], self.norms[2 * i : 2 * i + 4])
                states.append(self.norms[0](a))
            return [*states, b]

    with pytest.raises(ParallelStreamsError, match="streams exchange updates"):
        search(Returned(), torch.randn(2, 5, WIDTH))


class ScoresOverLayers(nn.Module):
    """Attention scores are summed over layers, as in RealFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.zeros(x.shape[0], x.shape[1], x.shape[1])
        for layer, norm in zip(self.layers, self.norms, strict=True):
            q, k, v = layer.qkv(norm(x)).chunk(3, -1)
            scores = scores + q @ k.mT
            x = x + layer.out(scores.softmax(-1) @ v)
        return x


def test_scores_that_are_summed_over_layers_are_no_stream():
    with pytest.raises(ParallelStreamsError, match="streams exchange updates"):
        search(ScoresOverLayers(), torch.randn(2, 5, WIDTH))


class Recurrent(nn.Module):
    """In its layers a state goes over the tokens, and what it says at each is normed."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(Mlp() for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for number, cell in enumerate(self.cells):
            outer, inner, said = self.norms[3 * number : 3 * number + 3]
            y, state, out = outer(x), torch.zeros_like(x[:, :1]), []
            for token in range(4):
                state = state + cell(inner(state) + y[:, token : token + 1])
                out.append(said(state))
            x = x + torch.cat(out, 1)
        return x


def test_a_recurrence_inside_a_layer_is_no_stream():
    (stream,) = search(Recurrent(), torch.randn(2, 4, WIDTH)).streams
    assert [update.kind for update in stream.updates] == ["residual"] * 4
    assert [update.add.meta["val"].shape[1] for update in stream.updates] == [4] * 4
