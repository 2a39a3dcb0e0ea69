"""The whole flow on a GPU: captured there and proven there, or captured on a CPU and moved."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import attnres_rewrite as ar
from tests.networks import VOCAB, WIDTH, Gpt, Mlp

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch"),
]
DEVICE = "cuda"
CONFIG = ar.AttnResConfig(num_blocks=2)
ids = torch.arange(24).reshape(2, 12) % VOCAB


class Attention(nn.Module):
    """As in nanoGPT. Proofs run in float64, for which a GPU has no fused attention: its result has another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, 2, -1).transpose(1, 2) for t in self.qkv(x).split(width, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, width))


class Block(nn.Module):
    """One pre-norm layer with it, two updates."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.attn, self.norm_2, self.mlp = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCAB, num_hidden_layers=3, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config)


NETWORKS = {"gpt": Gpt, "nanogpt": functools.partial(Gpt, block=Block), "llama": llama}


def logits_of(out) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def captured(model: nn.Module, device: str, **options) -> ar.RewrittenModule:
    keywords = {"use_cache": False} if hasattr(model, "config") else {}
    return ar.rewrite(model.to(device), (ids.to(device),), keywords, CONFIG, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_rewrite_is_proven_where_it_was_captured(name, dtype):
    new = captured(NETWORKS[name]().to(dtype), DEVICE)
    assert new.report.verify.passed
    assert {proof.name for proof in new.report.verify.proofs} == {"capture", "original", "independent"}
    assert any("Triton" in stream.runs_as for stream in new.report.streams)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_rewrite_moves_there(name, tmp_path):
    model = NETWORKS[name]()
    new = captured(model, "cpu", verify=False)
    ar.save(new, tmp_path / "new")
    wanted = logits_of(model(ids))
    for moved in (ar.load(tmp_path / "new", device=DEVICE), copy.deepcopy(new).to(DEVICE)):
        torch.testing.assert_close(logits_of(moved(ids.to(DEVICE))).cpu(), wanted, rtol=1e-3, atol=1e-4)
        assert ar.verify(moved).passed


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pipeline_of_what_was_captured_elsewhere(name):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new = captured(NETWORKS[name](), "cpu", verify=False, dynamic_shapes={})
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            parameter.add_(0.1 * torch.randn_like(parameter))
    whole = copy.deepcopy(new)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        plan = ar.partition(new, 1, 2)
        pipeline = ar.build_pipeline(plan, n_microbatches=1, device=DEVICE, loss_fn=lambda out, _: out.square().mean())
        pipeline.step(ids.to(DEVICE), target=ids.to(DEVICE))
        pipeline.reduce_tied_gradients()
    finally:
        dist.destroy_process_group()
    logits_of(whole(ids)).square().mean().backward()
    for parameter_name, parameter in pipeline.named_parameters():
        wanted = whole.get_parameter(parameter_name).grad
        torch.testing.assert_close(parameter.grad.cpu(), wanted, rtol=1e-2, atol=1e-4, msg=parameter_name)


def test_first_values_are_made_there():
    with torch.device("meta"):
        model = llama()
    new = ar.rewrite(model, (ids.to("meta"),), {"use_cache": False}, CONFIG, verify=False).to_empty(device=DEVICE)
    ar.initialize(new, model, lambda model: model.initialize_weights())
    assert logits_of(new(ids.to(DEVICE))).isfinite().all()
    assert ar.verify(new, (ids.to(DEVICE),), {"use_cache": False}).passed
