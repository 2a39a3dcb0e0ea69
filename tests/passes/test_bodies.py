import torch
from torch import nn

from attnres_rewrite.passes.bodies import all_written, draw_inside
from attnres_rewrite.passes.key_draws import is_draw

x = torch.ones(4, 8)


def captured(function):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x):
            return function(self, x)

    program = torch.export.export(Module(), (x,), strict=False).module()
    calls = [node for node in program.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]
    return program, calls[0]


def test_a_body_that_writes_into_buffers():
    def forward(self, x):
        with torch.no_grad():
            self.seen.add_(x.sum())
            self.mean[0].mul_(0.5)
        return x + self.seen

    program, call = captured(forward)
    assert [node.target for node in all_written(call, program)] == ["seen", "mean"]
    assert draw_inside(call, program, is_draw) is None


def test_a_body_in_a_body_that_draws():
    def forward(self, x):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            noise = torch.cond(x.sum() > 0, lambda y: y + torch.rand(4, 8), lambda y: y * 1.0, (x,))
        return x + noise

    program, call = captured(forward)
    assert draw_inside(call, program, is_draw).name.startswith("rand")
    assert all_written(call, program) == []


def test_what_has_no_body():
    program, _ = captured(lambda self, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)))
    sums = next(node for node in program.graph.nodes if node.target is torch.ops.aten.sum.default)
    assert draw_inside(sums, program, is_draw) is None
    assert all_written(sums, program) == []
