"""torch.set_default_device moves whatever is made without a device, and nothing of ours may be.

"meta" stands for every other device: a tensor made there by mistake has no numbers.
"""

import pytest
import torch

import attnres_rewrite as ar
from attnres_rewrite import functional as F
from attnres_rewrite.keyed_random import make_key
from tests.networks import VOCAB, WIDTH, Gpt, Layer

CONFIG = ar.AttnResConfig(num_blocks=2)
ids = torch.arange(16).reshape(2, 8) % VOCAB


@pytest.fixture
def _elsewhere():
    with torch.device("meta"):
        yield


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Gpt(depth=2, dropout=0.1)


@pytest.fixture(scope="module")
def new(model):
    with torch.device("meta"):
        new = ar.rewrite(model, (ids,), config=CONFIG)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            parameter.add_(torch.randn_like(parameter))
    return new.eval()


@pytest.mark.usefixtures("_elsewhere")
def test_a_rewrite_proves_itself(model, new):
    assert ar.verify(new).passed
    assert {parameter.device.type for parameter in new.parameters()} == {"cpu"}
    assert new(ids).device.type == "cpu"


@pytest.mark.usefixtures("_elsewhere")
def test_it_is_saved_and_loaded(new, tmp_path):
    loaded = ar.load(ar.save(new, tmp_path / "saved")).eval()
    assert torch.equal(loaded(ids), new(ids))


@pytest.mark.usefixtures("_elsewhere")
def test_it_is_diagnosed(new):
    diagnosis = ar.diagnose(new, [(ids,)], loss_fn=lambda out, batch: out.square().mean())
    assert diagnosis.num_batches == 1


def test_the_key_of_keyed_dropout_is_in_host_memory():
    wanted = make_key(1, 2, 3)
    with torch.device("meta"):
        assert torch.equal(make_key(1, 2, 3), wanted)


@pytest.mark.usefixtures("_elsewhere")
def test_a_pipeline_is_planned(new):
    assert len(ar.partition(new, 2).stages) == 2


@pytest.mark.usefixtures("_elsewhere")
def test_an_attached_model_runs():
    torch._dynamo.reset()
    # without attention: Tensor.unflatten breaks Dynamo's graph where a default device is set
    model = Gpt(block=lambda: Layer(lambda self, x: x + self.f(self.n1(x)))).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    wanted = model(ids)
    ar.attach(model, CONFIG, (ids,))
    model.compile(backend="attnres", options={"backend": "aot_eager"})
    torch.testing.assert_close(model(ids), wanted)


@pytest.mark.parametrize("call", ["read", "inter_block", "add_merge_norm"])
def test_kernels_of_a_cpu(call):
    torch._dynamo.reset()
    rows = [torch.randn(2, 4, WIDTH, requires_grad=True) for _ in range(3)]
    queries = [torch.randn(WIDTH, requires_grad=True) for _ in range(2)]

    def run():
        if call == "read":
            return F.attn_res_read(rows, queries[0])
        outs, lses = F.inter_block(rows[:2], queries)
        if call == "inter_block":
            return torch.stack([*outs, *(lse[..., None].expand_as(rows[0]) for lse in lses)])
        return F.add_merge_norm(rows[2], rows[0], outs[1], lses[1], queries[1], None, None, None, 1e-6)[1]

    def gradients(out):
        return torch.autograd.grad(out.square().sum(), [*rows, *queries], materialize_grads=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    wanted = run()
    F.reset_launches()
    with torch.device("meta"):
        found = compiled()
        found_gradients = gradients(found)
    assert any("C++" in name for name in F.launches()), F.launches()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(found_gradients, gradients(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
