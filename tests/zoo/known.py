"""Classes of the sweep that cannot be tried, and why; found by benchmarks/zoo.py."""

import pytest

from tests.zoo.spec import Spec

# class -> why no small model of it can be built here
NOT_BUILT = {
    "Gemma4AssistantForCausalLM": "a draft head: it reads the key-value cache of another model",
    "Gemma4UnifiedAssistantForCausalLM": "a draft head: it reads the key-value cache of another model",
    "DinatForImageClassification": "needs the natten library",
}

# torch.export refuses these, each for the reason given
NOT_CAPTURED = {
    "BltForCausalLM": "the length of a patch depends on the text",
    "DbrxForCausalLM": "a Python loop over the experts that were hit",
    "LongcatFlashForCausalLM": "a Python loop over the experts that were hit",
    "Qwen4ExpForCausalLM": "the number of blocks kept depends on the text",
    "LongformerForMaskedLM": "asks whether any token is global",
    "LEDForConditionalGeneration": "asks whether any token is global",
    "FSMTForConditionalGeneration": "asks whether any token is padding",
    "SwitchTransformersForConditionalGeneration": "indexes a mask that is None while exporting",
}

# classes of transformers that build a part with timm
NEEDS_TIMM = ("TimmWrapperForImageClassification", "Gemma3nForConditionalGeneration")


def skip_without_its_library(spec: Spec) -> None:
    """Skip a test of `spec` where the library of its model is not installed."""
    for library in ("timm", "diffusers"):
        if spec.family == library or (library == "timm" and spec.name in NEEDS_TIMM):
            pytest.importorskip(library, reason=f"a model of {library}: pip install attnres-rewrite[zoo]")
