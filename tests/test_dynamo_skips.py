"""An error inside a compiled call of an attached model: it is the caller's, and later calls are compiled again."""

import pytest
import torch

import attnres_rewrite as ar
from tests.attached import CONFIG, QUICK, assert_same, attached, ids, small
from tests.networks import Block, Gpt

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


class Picky(Gpt):
    def forward(self, ids):
        if ids.shape[1] > 10:
            raise ValueError(f"{ids.shape[1]} tokens are too many")
        return super().forward(ids)


@pytest.mark.parametrize("called_before", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_error_of_the_model_is_raised_and_harms_no_later_call(called_before):
    model, new = attached(Picky(depth=2).double())
    if called_before:
        model(ids)
    for _ in range(2):
        with pytest.raises(ValueError, match="11 tokens are too many"):
            model(torch.zeros(2, 11, dtype=torch.long))
    assert_same(model, new)
    torch.testing.assert_close(model(ids[:, :5]), new(ids)[:, :5])
    assert_same(*attached(Picky(depth=2).double()))


def test_lost_queries_are_named_and_attached_anew():
    model, _ = attached()
    model(ids)
    model.layers[1] = Block().double()
    for _ in range(2):
        with pytest.raises(ar.NotAttachedError, match="the model lost layers.1.attn_res.0.query"):
            model(ids)
    ar.detach(model)
    assert_same(*attached(model))


def test_a_call_that_torch_gave_up_does_not_run_the_old_network():
    model = small()
    ar.attach(model, CONFIG, (ids,))
    model.compile(**QUICK)
    torch._dynamo.eval_frame.skip_code(type(model).forward.__code__)
    torch._dynamo.eval_frame.skip_code(torch.nn.Module._call_impl.__code__)
    with pytest.raises(ar.NotCompiledError, match="torch.compile gave up this Gpt"):
        model(ids)
