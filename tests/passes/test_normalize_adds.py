"""Mirrors attnres_rewrite/passes/normalize_adds.py."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from attnres_rewrite.capture import capture
from attnres_rewrite.passes.normalize_adds import normalize_adds


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        return self.function(x, f)


def captured(function: Callable[[Tensor, Tensor], Tensor]) -> fx.GraphModule:
    model = Of(function)
    return capture(model, (torch.randn(2, 3), torch.randn(2, 3)), both_modes=False).programs[True]


def calls(gm: fx.GraphModule) -> list[str]:
    return [
        n.target._schema.name.removeprefix("aten::")
        for n in gm.graph.nodes
        if isinstance(n.target, torch._ops.OpOverload)
    ]


def in_place(x: Tensor, f: Tensor) -> Tensor:
    y = x.sin()
    y += f
    return y


def in_place_method(x: Tensor, f: Tensor) -> Tensor:
    return x.sin().mul_(2.0).add_(f)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(lambda x, f: x + f, ["add"], id="operator"),
        pytest.param(in_place, ["sin", "add"], id="iadd"),
        pytest.param(in_place_method, ["sin", "mul", "add"], id="add_"),
        pytest.param(lambda x, f: torch.add(x, f, alpha=2), ["mul", "add"], id="alpha"),
        pytest.param(lambda x, f: x - f, ["neg", "add"], id="sub"),
        pytest.param(lambda x, f: torch.addcmul(x, f, f, value=3), ["mul", "mul", "add"], id="addcmul"),
    ],
)
def test_every_spelling_becomes_one_add_of_the_same_value(function, expected):
    gm = captured(function)
    torch.manual_seed(0)
    x, f = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    want = function(x.clone(), f.clone())

    refused = normalize_adds(gm)
    gm.recompile()

    assert not refused
    assert calls(gm) == expected
    torch.testing.assert_close(gm(x, f), want, rtol=1e-14, atol=1e-14)


def seen_by_the_caller(x: Tensor, f: Tensor) -> Tensor:
    x += f
    return x


def seen_through_a_view(x: Tensor, f: Tensor) -> Tensor:
    y = x.sin()
    row = y[0]
    y += f
    return y + row


def seen_through_the_old_name(x: Tensor, f: Tensor) -> Tensor:
    y = x.sin()
    z = y.view(3, 2)
    z.mul_(2.0)
    return y + f


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        pytest.param(seen_by_the_caller, "the caller can see", id="input"),
        pytest.param(seen_through_a_view, "read later", id="view"),
        pytest.param(seen_through_the_old_name, "read later", id="base"),
    ],
)
def test_a_write_that_is_seen_elsewhere_stays_with_a_reason(function, reason):
    gm = captured(function)
    x, f = torch.randn(2, 3), torch.randn(2, 3)
    want = function(x.clone(), f.clone())

    refused = normalize_adds(gm)
    gm.recompile()

    assert reason in " ".join(refused.values())
    torch.testing.assert_close(gm(x.clone(), f), want, rtol=0, atol=1e-6)


def test_a_subtraction_that_broadcasts_is_left_alone():
    gm = captured(lambda x, f: x - f.mean(-1, keepdim=True))
    normalize_adds(gm)
    assert calls(gm) == ["mean", "sub"]
