import pytest
import torch
from torch import nn

from attnres_rewrite.errors import PartitionError
from attnres_rewrite.keyed_random import make_key
from attnres_rewrite.passes.key_draws import KEY, key_draws

x = torch.ones(8, 16)


def captured(function, training=True):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return function(self, x)

    return torch.export.export(Module().train(training), (x,)).module()


def run(program, microbatch=0):
    torch.manual_seed(0)  # of no influence
    module = torch.fx.GraphModule(program, program.graph)
    names = [node.target for node in program.graph.find_nodes(op="placeholder")]
    key = make_key(0, 0, microbatch)
    return torch.fx.Interpreter(module).run(x, *([key] if KEY in names else []), enable_io_processing=False)[0]


DRAWS = {
    "dropout": lambda self, x: self.drop(x),
    "dropout in place": lambda self, x: nn.functional.dropout(x + 1, 0.5, True, True),
    "dropout2d in place": lambda self, x: nn.functional.dropout2d((x + 1).view(8, 4, 2, 2), 0.5, True, True).view(
        8, 16
    ),
    "drop path": lambda self, x: x * x.new_empty(8, 1).bernoulli_(0.5),
    "statement": lambda self, x: _written(x),
    "rand": lambda self, x: x + torch.rand(8, 1),
    "rand_like": lambda self, x: x + torch.rand_like(x),
    "uniform_": lambda self, x: x * torch.empty_like(x).uniform_(0.5, 1.5),
    "bernoulli": lambda self, x: torch.bernoulli(x * 0.5),
    "feature_dropout": lambda self, x: nn.functional.dropout2d(x.view(8, 4, 2, 2), 0.5).view(8, 16),
    "attention": lambda self, x: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
}


def _written(x):
    mask = torch.empty_like(x)
    mask.bernoulli_(0.5)
    return x * mask


@pytest.mark.parametrize("case", DRAWS)
def test_a_draw_follows_from_the_key(case):
    program = captured(DRAWS[case])
    assert key_draws(program.graph, program) == 1
    program.graph.lint()
    first, again, other = run(program), run(program), run(program, 1)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_sites_draw_apart():
    program = captured(lambda self, x: torch.stack([self.drop(x), self.drop(x)]))
    assert key_draws(program.graph, program) == 2
    one, two = run(program)
    assert not torch.equal(one, two)


# In place was once refused: to draw nothing, too
@pytest.mark.parametrize("inplace", [False, True])
def test_what_draws_nothing_is_left_alone(inplace):
    program = captured(lambda self, x: nn.functional.dropout(x + 1, 0.5, self.drop.training, inplace), training=False)
    before = str(program.graph)
    assert key_draws(program.graph, program) == 0
    assert str(program.graph) == before


def test_a_draw_without_a_keyed_form_is_refused():
    program = captured(lambda self, x: x + torch.randn_like(x))
    with pytest.raises(PartitionError, match=r"randn_like draws random numbers.*\n.*\n.*dropout=\"torch\""):
        key_draws(program.graph, program)


# Once left as it was: every rank drew for itself
def test_a_draw_under_no_grad_is_refused():
    def forward(self, x):
        with torch.no_grad():
            noise = torch.rand(8, 1)
        return x + noise

    program = captured(forward)
    with pytest.raises(PartitionError, match=r"rand draws random numbers inside wrap_with_set_grad_enabled"):
        key_draws(program.graph, program)
