"""Bytes and operations, against counts made by other means."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attnres_rewrite as ar
from attnres_rewrite.page.forecast import forecast
from tests.networks import VOCAB, WIDTH, Block, gpt, gpt_of, ids


def test_bytes_of_a_report(report):
    found = forecast(report, None)
    # two reads of a query and a gain of 8 float32
    assert found.parameter_bytes == 2 * 2 * 8 * 4
    # the root and two blocks
    assert found.bank_bytes == 3 * 32
    # chosen are 512 and 640; one merge has 8 rows that the original moves too
    assert found.extra_bytes == 512 + 640 - 8 * 32
    assert found.extra_ns == pytest.approx(896 / 2.4e12 * 1e9)
    assert found.step is None
    assert found.ratios is None


@pytest.mark.parametrize("variant", [{}, {"gate": True}, {"key_rank": 4, "key_norm": False}], ids=str)
def test_parameters_are_those_of_the_model(variant):
    config = ar.AttnResConfig(num_blocks=2, **variant)
    new = ar.rewrite(gpt(), (ids(),), config=config, dynamic_shapes={}, verify=False)
    added = [value for name, value in new.named_parameters() if ".attn_res." in f".{name}"]
    found = forecast(new.report, new)
    assert found.num_parameters == sum(value.numel() for value in added)
    assert found.parameter_bytes == sum(value.numel() * value.element_size() for value in added)


def test_gates_move_bytes_too(report):
    gated = replace(report, config=report.config | {"gate": True})
    # 3 updates and 2 reads of rows of 32 bytes
    assert forecast(gated, None).extra_bytes == forecast(report, None).extra_bytes + (3 * 6 + 2 * 9) * 32


def test_operations_are_those_that_torch_counts():
    model = gpt_of(lambda layer, x: x + layer.f(layer.n1(x + layer.g(layer.n2(x)))))
    new = ar.rewrite(model, (ids(),), dynamic_shapes={}, verify=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids())
    step = forecast(new.report, new).step
    assert step.num_tokens == ids().numel()
    assert step.flops * step.num_tokens == pytest.approx(3 * counter.get_total_flops())


def test_the_time_of_a_step_lies_between_all_fused_and_nothing_fused():
    new = ar.rewrite(gpt(2), (ids(),), dynamic_shapes={}, verify=False)
    found = forecast(new.report, new)
    unfused, fused = found.ratios
    assert 1 < unfused < fused
    assert fused == pytest.approx(1 + found.extra_bytes / 2.4e12 / (found.step.flops / 400e12))


def test_sizes_that_depend_on_the_data_are_not_counted():
    def step(layer, x):
        rows = layer.n1(x).flatten(0, 1)
        return x + layer.f(layer.n1(x)) * layer.g(rows[rows[:, 0] > 0]).mean()

    new = ar.rewrite(gpt_of(step), (ids(),), dynamic_shapes={}, verify=False)
    assert forecast(new.report, new).step.num_uncounted > 0
    assert "whose sizes depend on the data are not counted" in ar.html_report(new)


class TwoStreams(nn.Module):
    """A stack over each of two texts; the second is told the mean of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.encoder, self.decoder = nn.ModuleList([Block(), Block()]), nn.ModuleList([Block(), Block()])
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, text, target):
        x, y = self.embed(text), self.embed(target)
        for layer in self.encoder:
            x = layer(x)
        for layer in self.decoder:
            y = layer(y)
        return self.head(self.norm_2(y) + self.norm_1(x).mean(1, keepdim=True))


def test_streams_may_have_different_numbers_of_tokens():
    lengths = (4, 40)
    inputs = [ids(2, length) for length in lengths]
    new = ar.rewrite(TwoStreams().eval(), tuple(inputs), dynamic_shapes={}, verify=False)
    found = forecast(new.report, new)
    assert found.step.stream_tokens == (8, 80)
    whole_step = sum(stream.extra_bytes * count for stream, count in zip(found.streams, (8, 80), strict=True))
    assert found.ratios[1] == pytest.approx(1 + whole_step / 2.4e12 / (8 * found.step.flops / 400e12))
    assert "on the example inputs of 8 tokens (stream0), 80 tokens (stream1)" in ar.html_report(new)
