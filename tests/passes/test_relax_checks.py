"""Mirrors attnres_rewrite/passes/relax_checks.py: a model that casts runs under autocast, and in no other precision."""

import pytest
import torch
from torch import nn

import attnres_rewrite as ar
from attnres_rewrite.passes.relax_checks import check_captured
from tests.networks import WIDTH, Gpt, ids


class UpcastNorm(nn.Module):
    """RMSNorm as Llama has it: torch.export asserts the dtype before each of its casts."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Casting(Gpt):
    def __init__(self):
        super().__init__(depth=3)
        for layer in self.layers:
            layer.norm_1, layer.norm_2 = UpcastNorm(), UpcastNorm()
            layer.attn.register_forward_hook(lambda _, args, out: out.float().to(out.dtype))


def pair():
    model = Casting()
    return model, ar.rewrite(model, (ids(),), config=ar.AttnResConfig(num_blocks=2), verify=False)


def test_at_zero_queries_it_is_the_original_under_autocast():
    model, new = pair()
    assert any(node.target is check_captured for node in new.graph.nodes)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(new(ids()), model(ids()), rtol=0, atol=2e-2)


def test_every_form_of_a_rewrite_runs_and_learns_under_autocast(tmp_path):
    _, new = pair()
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            parameter.add_(torch.randn_like(parameter))
    forms = {
        "flat": new,
        "loaded": ar.load(ar.save(new, tmp_path / "saved")),
        "nested": ar.unflatten(new, "layers.*"),
        "stage": lambda ids: ar.partition(new, 1).stages[0].module(ids)[0],
        "compiled": torch.compile(new, backend="aot_eager", fullgraph=True),
    }
    wanted = new(ids())
    for name, form in forms.items():
        new.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = form(ids())
        torch.testing.assert_close(out.float(), wanted, rtol=0, atol=0.1, msg=lambda text, name=name: f"{name}: {text}")
        if name != "loaded":
            out.float().square().mean().backward()
            assert all(parameter.grad is not None for parameter in new.parameters()), name


def test_another_precision_is_refused():
    _, new = pair()
    with pytest.raises(TypeError, match=r"float64 and was captured as torch\.float32.* Rewrite the model in"):
        new.double()(ids())
    narrow = ar.rewrite(Casting().bfloat16(), (ids(),), verify=False).float()
    with (
        pytest.raises(TypeError, match=r"float32 and was captured as torch\.bfloat16"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        narrow(ids())


def test_another_device_is_refused():
    value = torch.empty(2, device="meta")
    check_captured(value, torch.float32, torch.device("meta"))
    with pytest.raises(TypeError, match=r"on meta and was captured on cpu: .* with its method to\('meta'\)"):
        check_captured(value, torch.float32, torch.device("cpu"))
