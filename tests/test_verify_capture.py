"""Mirrors attnres_rewrite/verify.py: the proof that the captured graph is the model, gradients included."""

from typing import Any

import pytest
import torch

import attnres_rewrite as ar
from tests.networks import WIDTH, Layer, gpt, gpt_of, ids


class Reversed(torch.autograd.Function):
    """The identity, with the gradient turned around."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -grad


def hooked(s: Layer, x: torch.Tensor) -> torch.Tensor:
    update = s.f(s.n1(x))
    if update.requires_grad:
        update.register_hook(lambda grad: -grad)
    return x + update


@pytest.mark.parametrize(
    "step", [lambda s, x: x + Reversed.apply(s.f(s.n1(x))), hooked], ids=["autograd.Function", "register_hook"]
)
def test_a_backward_that_the_capture_loses_is_refused(step):
    with pytest.raises(ar.ProofError, match="does not give the model's gradients"):
        ar.rewrite(gpt_of(step), (ids(),), dynamic_shapes={})


def test_a_module_with_a_backward_hook_is_refused():
    model = gpt(2)
    model.layers[1].mlp.register_full_backward_hook(lambda module, ours, theirs: (-ours[0],))
    with pytest.raises(ar.ProofError, match=r"register_full_backward_hook") as refusal:
        ar.rewrite(model, (ids(),), dynamic_shapes={})
    assert ", at layers." in str(refusal.value).splitlines()[0]


def test_the_capture_proof_compares_the_gradient_of_every_parameter_that_is_trained():
    model = gpt(2)
    model.embed.requires_grad_(False)
    capture, *_ = ar.rewrite(model, (ids(),), dynamic_shapes={}).report.verify.proofs
    assert capture.num_gradients == sum(parameter.requires_grad for parameter in model.parameters())
    assert capture.gradient_error is not None
    assert capture.gradient_error < 1e-5


def test_statistics_of_copied_batch_norms_are_left_as_they_were():
    model = gpt_of(lambda s, x: x + s.n2(s.f(s.n1(x)).mT).mT)
    for layer in model.layers:
        layer.n2 = torch.nn.BatchNorm1d(WIDTH)
    new = ar.rewrite(model.train(), (ids(),), dynamic_shapes={}, share_parameters=False)
    assert new.get_buffer("layers.0.n2.num_batches_tracked") == 0
    assert not new.get_buffer("layers.0.n2.running_mean").any()


def in_place(s: Layer, x: torch.Tensor) -> torch.Tensor:
    x += s.f(s.n1(x))
    return x


def test_a_model_without_a_backward_of_its_own_is_compared_forward_and_has_a_note():
    verified = ar.rewrite(gpt_of(in_place), (ids(),), dynamic_shapes={}).report.verify
    assert verified.passed
    assert verified.proofs[0].gradient_error is None
    assert "the model itself has no backward" in verified.notes[0]
