"""Real architectures: each is rewritten and proven, with the updates counted by hand, or refused."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers", reason="the zoo is built from transformers: pip install attnres-rewrite[zoo]")

import attnres_rewrite as ar
from tests.zoo.builders import Spec, hand_counted, sweep, timm_sweep
from tests.zoo.known import NOT_BUILT, NOT_CAPTURED, skip_without_its_library

FLOAT64_LIMIT = 1e-10

# one of each habit: how it adds, norms, scales, routes, and how many streams it has
DEFAULT_RUN = """
    gpt2 llama qwen3_moe gemma4 cohere bloom deepseek_v3 t5 vit dinov2 bert torch_encoder
    nanogpt_in_place nanogpt_unet nanogpt_nested timm_vit timm_swin timm_siglip diffusers_sd3
"""


def _counted() -> list[object]:
    chosen = DEFAULT_RUN.split()
    return [
        pytest.param(spec, id=spec.name, marks=() if spec.name in chosen else pytest.mark.slow)
        for spec in hand_counted()
    ]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # tiny tensors: threads cost more than they bring, and the tests run side by side
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _rewrite(spec: Spec) -> ar.RewrittenModule:
    skip_without_its_library(spec)
    return ar.rewrite(spec.build(), (), spec.inputs(), config=ar.AttnResConfig(block_size=2))


def _check_proofs(report: ar.RewriteReport) -> None:
    assert report.verify is not None
    assert report.verify.passed
    assert {proof.name for proof in report.verify.proofs} >= {"capture", "original", "independent"}
    for proof in report.verify.proofs:
        if proof.name == "original" and proof.dtype == "float64":
            assert proof.output_error < FLOAT64_LIMIT


@pytest.mark.parametrize("spec", _counted())
def test_updates_are_those_counted_by_hand(spec: Spec) -> None:
    if isinstance(spec.expected, str):
        with pytest.raises(getattr(ar, spec.expected)):
            _rewrite(spec)
        return
    report = _rewrite(spec).report
    _check_proofs(report)
    assert tuple(stream.num_updates for stream in report.streams) == spec.expected


@pytest.mark.slow
@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.name) for spec in (*sweep(), *timm_sweep())])
def test_every_class_is_proven_or_refused_with_a_reason(spec: Spec) -> None:
    if spec.name in NOT_BUILT:
        pytest.skip(NOT_BUILT[spec.name])
    if spec.name in NOT_CAPTURED:
        with pytest.raises(ar.CaptureError):
            _rewrite(spec)
        return
    refusal, report = _refusal_or_report(spec)
    if report is None:
        # what is wrong, then why or what to do about it
        assert len(refusal.splitlines()) > 1
    else:
        _check_proofs(report)


def _refusal_or_report(spec: Spec) -> tuple[str, ar.RewriteReport | None]:
    try:
        return "", _rewrite(spec).report
    except (ar.CaptureError, ar.ProofError):
        raise
    except ar.RewriteError as refusal:
        return str(refusal), None


def test_every_name_is_given_once() -> None:
    names = [spec.name for spec in (*hand_counted(), *sweep(), *timm_sweep())]
    assert len(names) == len(set(names))
    assert set(DEFAULT_RUN.split()) - {"inkling2"} <= set(names)  # not in every release of transformers
