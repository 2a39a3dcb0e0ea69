"""Which parameters are joined; that the gradients are right then is in test_stage.py and test_build.py."""

import pytest
import torch
from torch import fx, nn

from attnres_rewrite.pipeline.split_backward import join_parameters


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.one, self.two, self.table = (nn.Parameter(torch.randn(4)) for _ in range(4))


def joined_by(forward) -> tuple[tuple[str, ...], fx.GraphModule]:
    class Made(Stage):
        pass

    Made.forward = forward
    module = fx.symbolic_trace(Made())
    for node in module.graph.find_nodes(op="placeholder"):
        node.meta["val"] = torch.randn(4)
    return join_parameters(module, 1), module


CASES = {
    "apart": (lambda self, ids, x: (x * self.one + self.two).tanh(), ()),
    "an own sum first": (lambda self, ids, x: x * (self.one + self.two), ()),
    "shared beside own ones": (
        lambda self, ids, x: (x * (self.shared + self.one)) * (self.shared + self.two),
        ("one", "shared", "two"),
    ),
    "used twice": (lambda self, ids, x: (x * self.one * self.two).tanh() * self.one, ("one",)),
    "sent as it is": (lambda self, ids, x: (x * self.one, self.table + ids), ("table",)),
}


@pytest.mark.parametrize("case", CASES)
def test_parameters_with_joints_of_their_own_are_left_alone(case):
    forward, wanted = CASES[case]
    names, module = joined_by(forward)
    assert names == wanted
    x = torch.randn(4, requires_grad=True)
    module(torch.zeros(4), x)


def test_frozen_parameters_need_no_joint():
    def forward(self, ids, x):
        return x * self.one, self.table + ids

    class Frozen(Stage):
        pass

    Frozen.forward = forward
    stage = Frozen()
    stage.table.requires_grad_(False)
    module = fx.symbolic_trace(stage)
    for node in module.graph.find_nodes(op="placeholder"):
        node.meta["val"] = torch.randn(4)
    assert join_parameters(module, 1) == ()


def test_a_joint_changes_no_value_and_no_gradient():
    forward, _ = CASES["sent as it is"]
    _, module = joined_by(forward)
    x = torch.randn(4, requires_grad=True)
    first, second = module(torch.ones(4), x)
    torch.testing.assert_close(second, module.table + 1)
    (first.sum() + 3 * second.sum()).backward()
    torch.testing.assert_close(module.table.grad, torch.full((4,), 3.0))
    torch.testing.assert_close(x.grad, module.one.detach())
