"""Mirrors attnres_rewrite/passes/find_stream.py: what is a stream, what is not, and why."""

import pytest
import torch
from torch import Tensor, nn

from attnres_rewrite.capture import capture
from attnres_rewrite.errors import NoStreamError, ParallelStreamsError, PostNormError
from attnres_rewrite.fxgraph import source_line
from attnres_rewrite.passes.find_stream import find_stream
from attnres_rewrite.passes.join_slices import join_slices
from attnres_rewrite.passes.normalize_adds import normalize_adds
from attnres_rewrite.records import StreamSearch
from tests.networks import WIDTH, Gpt, Layer, Mlp, gpt, gpt_of, ids


def search(model: nn.Module, *args: Tensor) -> StreamSearch:
    gm = capture(model, args or (ids(),), both_modes=False).programs[model.training]
    normalize_adds(gm)
    join_slices(gm.graph)
    return find_stream(gm)


def in_place(s: Layer, x: Tensor) -> Tensor:
    x = x + s.f(s.n1(x))
    x += s.g(s.n2(x))
    return x


def reshaped(s: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    flat = flat + s.f(s.n1(flat))
    back = flat.view(x.shape).transpose(0, 1)
    return (back + s.g(s.n2(back))).transpose(0, 1)


def u_net(s: Layer, x: Tensor) -> Tensor:
    y = x + s.f(s.n1(x))
    return y + s.g(s.n2(y)) + x


SPELLINGS = {
    "sequential": (lambda s, x: (y := x + s.f(s.n1(x))) + s.g(s.n2(y)), ["residual"] * 2),
    "parallel, stream first": (lambda s, x: x + s.f(s.n1(x)) + s.g(s.n2(x)), ["residual", "parallel"]),
    "parallel, branches first": (lambda s, x: (s.f(s.n1(x)) + s.g(s.n2(x))) + x, ["residual"]),
    "in place": (in_place, ["residual"] * 2),
    "layer scale": (lambda s, x: x + s.gain * s.f(s.n1(x)), ["residual"]),
    "sandwich norm": (lambda s, x: x + s.n2(s.f(s.n1(x))), ["residual"]),
    "residual multiplier": (lambda s, x: x + 0.22 * s.f(s.n1(x)), ["residual"]),
    "both sides scaled": (lambda s, x: x * 0.9 + s.f(s.n1(x)) * 0.1, ["residual"]),
    "channel gain on the stream": (lambda s, x: x * s.gain + s.f(s.n1(x)), ["residual"]),
    "float64 stream": (lambda s, x: (x.double() + s.f(s.n1(x))).float(), ["residual"]),
    "views and transposes": (reshaped, ["residual"] * 2),
    "injection": (
        lambda s, x: (y := x + s.f(s.n1(x))) + s.gain + s.g(s.n2(y)),
        ["residual", "inject", "residual"],
    ),
    "u-net skip": (u_net, ["residual", "residual", "skip"]),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_updates_are_found_in_every_spelling(name):
    step, kinds = SPELLINGS[name]
    found = search(gpt_of(step))
    assert [update.kind for stream in found.streams for update in stream.updates] == kinds * 2
    assert found.streams[0].width == WIDTH


def test_every_other_add_has_a_reason_and_a_place():
    found = search(gpt(depth=2))
    assert len(found.streams[0].updates) == 4
    assert [entry.reason.split(":")[0] for entry in found.left_alone] == [
        "is element-wise",
        "adds a number",
    ] * 2
    assert all(entry.source_line.partition(":")[0].endswith("networks.py") for entry in found.left_alone)


def test_reads_are_told_from_the_next_add():
    (stream,) = search(gpt(depth=1)).streams
    readers = [[reader.name for reader in readers] for readers in stream.readers]
    assert readers == [["layer_norm"], ["layer_norm_1"], ["layer_norm_2"]]


def test_a_raw_reader_is_named_as_dependent_on_scale():
    (stream,) = search(gpt_of(lambda s, x: x + s.f(x))).streams
    assert [culprit is None for culprit in stream.scale_culprits] == [True, False, True]
    assert "linear" in str(stream.scale_culprits[1])


class TwoTowers(nn.Module):
    """An encoder and a decoder that attends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = gpt(2), gpt(3)
        self.cross = Mlp()

    def forward(self, ids: Tensor) -> Tensor:
        memory = self.encoder(ids)
        x = self.decoder.embed(ids)
        for layer in self.decoder.layers:
            x = layer(x)
            x = x + self.cross(self.decoder.norm(x)) * memory.mean()
        return self.decoder.head(self.decoder.norm(x))


def test_several_streams_are_found_and_named():
    found = search(TwoTowers())
    assert [(stream.name, len(stream.updates)) for stream in found.streams] == [
        ("encoder", 4),
        ("stream1", 9),
    ]


def nested(s: Layer, x: Tensor) -> Tensor:
    y = s.n1(x)
    y = y + s.f(y)
    y = y + s.g(y)
    return x + y


def test_a_chain_inside_a_branch_is_not_a_stream():
    found = search(gpt_of(nested))
    assert [len(stream.updates) for stream in found.streams] == [2]
    assert [entry.reason for entry in found.left_alone].count("lies inside one branch of a stream") == 4


def summed_in_the_branch(s: Layer, x: Tensor) -> Tensor:
    y = x + s.f(s.n1(x))
    y = y + s.g(s.n2(y))
    return x + s.f(s.n1(y))


def test_a_chain_that_starts_from_the_state_itself_is_not_taken_for_the_stream():
    found = search(gpt_of(summed_in_the_branch, depth=3))
    (stream,) = found.streams
    assert [update.kind for update in stream.updates] == ["residual"] * 3
    assert len({source_line(update.add) for update in stream.updates}) == 1


def post_norm(s: Layer, x: Tensor) -> Tensor:
    x = s.n1(x + s.f(x))
    return s.n2(x + s.g(x))


def relu_after_add(s: Layer, x: Tensor) -> Tensor:
    return torch.relu(x + s.f(x))


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        pytest.param(post_norm, PostNormError, "post-norm", id="post-norm"),
        pytest.param(relu_after_add, NoStreamError, "relu", id="relu after the add"),
        pytest.param(lambda s, x: s.f(s.n1(x)), NoStreamError, "adds were looked at", id="no residual"),
    ],
)
def test_what_is_no_stream_is_refused_with_the_reason(step, error, message):
    with pytest.raises(error, match=message):
        search(gpt_of(step, depth=3))


def test_a_dropout_on_the_sum_cuts_the_stream_in_train_mode_only():
    model = gpt_of(lambda s, x: torch.dropout(x + s.f(s.n1(x)), 0.5, s.training), depth=4)
    assert [len(stream.updates) for stream in search(model).streams] == [4]
    with pytest.raises(NoStreamError, match="the sum passes through dropout before the next update"):
        search(model.train())


class Reversible(nn.Module):
    """Two streams, each updated from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(6))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x, x.flip(1)
        for i in range(0, 6, 2):
            a = a + self.layers[i](self.norms[i](b))
            b = b + self.layers[i + 1](self.norms[i + 1](a))
        return torch.cat([a, b], -1)


def test_streams_that_exchange_updates_are_refused():
    with pytest.raises(ParallelStreamsError, match="2 streams exchange updates"):
        search(Reversible(), torch.randn(2, 5, WIDTH))


def test_known_designs_with_several_streams_are_refused_by_name():
    class TinyHyperConnection(Layer):
        pass

    torch.manual_seed(0)
    model = Gpt(2, block=lambda: TinyHyperConnection(lambda s, x: x + s.f(s.n1(x))))
    with pytest.raises(ParallelStreamsError, match="TinyHyperConnection"):
        search(model.eval())


def written_behind_its_back(s: Layer, x: Tensor) -> Tensor:
    x = x + s.f(s.n1(x))
    rows = x.view(-1, WIDTH)
    rows.mul_(0.5)
    return x + s.g(s.n2(x))


def update_written_after_its_add(s: Layer, x: Tensor) -> Tensor:
    update = s.f(s.n1(x))
    x = x + update
    update.view(-1, WIDTH).mul_(0.5)
    return x + s.g(s.n2(x)) + update


@pytest.mark.parametrize("step", [written_behind_its_back, update_written_after_its_add])
def test_a_stream_that_is_written_through_another_name_is_refused(step):
    with pytest.raises(NoStreamError, match="is written in place later, by mul_ at"):
        search(gpt_of(step))


class Convolutions(nn.Module):
    """A ConvNeXt-like stage: the channels are axis 1 on the stream, and last in the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.mlps = nn.ModuleList(Mlp(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm, mlp in zip(self.convs, self.norms, self.mlps, strict=True):
            x = x + mlp(norm(conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x.mean((-2, -1))


def test_the_channel_axis_is_read_off_the_consumers():
    (stream,) = search(Convolutions(), torch.randn(2, 8, 8, 8)).streams
    assert stream.axes == (1, 1, 1, 1)


class Undecided(nn.Module):
    """Nothing says which axis holds the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.einsum("btd,ts->bsd", torch.tanh(x), self.mix)
        return x


def test_an_axis_that_nothing_names_is_refused():
    with pytest.raises(NoStreamError, match="channel axis cannot be told: its readers name no axis"):
        search(Undecided(), torch.randn(2, 5, 8))


def test_a_copy_of_a_state_that_is_written_into_ends_the_stream():
    def overwritten(s: Layer, x: Tensor) -> Tensor:
        x = x + s.f(s.n1(x))
        x = x.clone()
        x[:, 0] = 0
        return x + s.g(s.n2(x))

    with pytest.raises(NoStreamError, match="is written in place later, by fill_"):
        search(gpt_of(overwritten))


def test_a_division_that_rounds_is_no_carrier():
    def rounded(s: Layer, x: Tensor) -> Tensor:
        x = x + s.f(s.n1(x))
        x = x + s.g(s.n2(x))
        return torch.div(x, 0.5, rounding_mode="floor")

    with pytest.raises(NoStreamError, match="the sum passes through div before the next update"):
        search(gpt_of(rounded))


def test_a_state_that_only_lends_its_dtype_or_form_is_not_used_there():
    spellings = (
        lambda s, x: (x.float() + s.f(s.n1(x))).type_as(x),
        lambda s, x: (x.flatten(0, 1) + s.f(s.n1(x)).flatten(0, 1)).view_as(x),
    )
    for step in spellings:
        (stream,) = search(gpt_of(step, depth=4)).streams
        assert [update.kind for update in stream.updates] == ["residual"] * 4
