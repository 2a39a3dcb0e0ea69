"""Torch stops compiling a function after some recompilations: each class has its own count."""

import pytest
import torch

import attnres_rewrite as ar
from tests.networks import VOCAB, Gpt

CONFIG = ar.AttnResConfig(num_blocks=2)
ids = torch.arange(16).reshape(2, 8) % VOCAB


class Other(Gpt):
    pass


@torch._dynamo.config.patch(recompile_limit=1)
def test_models_of_two_classes_share_no_count():
    torch._dynamo.reset()
    models = [Gpt(depth=1), Other(depth=1)]
    for model in models:
        ar.attach(model, CONFIG, (ids,))
        model.compile(backend="attnres", options={"backend": "aot_eager"})
        model(ids)
    twin = Gpt(depth=1).double()
    ar.attach(twin, CONFIG, (ids,))
    twin.compile(backend="attnres", options={"backend": "aot_eager"})
    with pytest.raises(ar.NotCompiledError, match=r"torch\._dynamo\.config\.recompile_limit"):
        twin(ids)
