"""Real architectures with each variant of the read: both proofs, in every mode that differs."""

import pytest
import torch

pytest.importorskip("transformers", reason="the zoo is built from transformers: pip install attnres-rewrite[zoo]")

import attnres_rewrite as ar
from tests.zoo.builders import hand_counted

VARIANTS = (
    {"num_heads": 4},
    {"key_rank": 8, "gate": True},
    {"recency_bias": 2.0},
    {"num_heads": 2, "gate": True, "recency_bias": -1.0},
    {"gate": True, "schedule": "two_phase"},
)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        pytest.param("vit", marks=pytest.mark.slow),
        pytest.param("t5", marks=pytest.mark.slow),
        pytest.param("gemma3", marks=pytest.mark.slow),
        pytest.param("gptj", marks=pytest.mark.slow),
    ],
)
def test_every_variant_is_proven(name: str) -> None:
    (spec,) = (spec for spec in hand_counted() if spec.name == name)
    model, inputs = spec.build(), spec.inputs()
    # one capture for all
    program = torch.export.export(model, (), inputs, strict=False)
    for variant in VARIANTS:
        config = ar.AttnResConfig(block_size=2, **variant)
        report = ar.rewrite(program, (), inputs, config=config).report
        assert report.verify is not None
        assert report.verify.passed, variant
        sizes = [sum(config.parameter_sizes(stream.width).values()) * len(stream.reads) for stream in report.streams]
        assert report.num_parameters_added == sum(sizes)
