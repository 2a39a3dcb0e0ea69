"""Arguments of another kind, at every public function of the rewrite: a TypeError that says how to write the call."""

import pytest
import torch

import attnres_rewrite as ar
from tests.networks import VOCAB, Gpt

CONFIG = ar.AttnResConfig(num_blocks=2)
ids = torch.arange(16).reshape(2, 8) % VOCAB


@pytest.mark.parametrize(
    "call", [ar.rewrite, ar.inspect, lambda model, *args, **kwargs: ar.attach(model, None, *args, **kwargs)]
)
@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((ids,), {}, r"args is a Tensor.*args=\(ids,\)"),
        (((ids,), CONFIG), {}, r"kwargs is a AttnResConfig.*config=\.\.\."),
    ],
)
def test_inputs(call, args, kwargs, says):
    with pytest.raises(TypeError, match=says):
        call(Gpt(), *args, **kwargs)


@pytest.mark.parametrize("call", [ar.rewrite, ar.inspect, ar.attach])
@pytest.mark.parametrize("config", [8, {"num_blocks": 8}])
def test_config(call, config):
    model = Gpt()
    with pytest.raises(TypeError, match=r"config=AttnResConfig\(num_blocks=8\)"):
        call(model, args=(ids,), config=config)
    model(ids)


def test_verify_takes_what_rewrite_returned():
    with pytest.raises(TypeError, match=r"rewrite\(\) or load\(\) returned; this is a Gpt"):
        ar.verify(Gpt())
    new = ar.rewrite(Gpt(depth=1), (ids,), verify=False, dynamic_shapes={})
    with pytest.raises(TypeError, match=r"args=\(ids,\)"):
        ar.verify(new, ids)
    for call in (ar.detach, lambda model: ar.original(model).__enter__()):
        with pytest.raises(ar.NotAttachedError, match=r"attach\(\) did not add them"):
            call(new)


@pytest.mark.parametrize("call", [ar.rewrite, ar.inspect, ar.attach])
def test_inference_mode(call):
    with torch.inference_mode(), pytest.raises(ar.CaptureError, match="cannot be trained"):
        call(Gpt(), args=(ids,), config=CONFIG)
    with torch.no_grad():
        call(Gpt(depth=1), args=(ids,), config=CONFIG, **({"verify": False} if call is ar.rewrite else {}))
