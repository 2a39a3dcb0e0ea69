"""Mirrors attnres_rewrite/config.py."""

import pytest
import torch

import attnres_rewrite as ar
from attnres_rewrite.config import config_from, describe_config


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_blocks": 0}, ValueError, "num_blocks=0 must be at least 1"),
        ({"num_blocks": -3}, ValueError, "num_blocks=-3 must be at least 1"),
        ({"block_size": 0}, ValueError, "block_size=0 must be at least 1"),
        ({"block_layers": -1}, ValueError, "block_layers=-1 must be at least 1"),
        ({"num_blocks": "some"}, ValueError, "'some' must be a count or \"full\""),
        ({"num_blocks": 2.0}, TypeError, "num_blocks=2.0 must be an integer"),
        ({"block_size": True}, TypeError, "block_size=True must be an integer"),
        ({"num_blocks": 2, "block_size": 3}, ValueError, "num_blocks=2 and block_size=3 both group"),
        ({"output": "max"}, ValueError, "output='max' must be one of 'sum', 'mean'"),
        ({"schedule": "fast"}, ValueError, "schedule='fast' must be one of"),
        ({"eps": 0.0}, ValueError, "eps=0.0 must be positive and finite"),
        ({"eps": float("inf")}, ValueError, "eps=inf must be positive and finite"),
        ({"eps": float("nan")}, ValueError, "eps=nan must be positive and finite"),
        ({"param_dtype": torch.int32}, ValueError, "not a floating-point dtype"),
        ({"num_heads": 0}, ValueError, "num_heads=0 must be at least 1"),
        ({"num_heads": 2.0}, TypeError, "num_heads=2.0 must be an integer"),
        ({"num_heads": True}, TypeError, "num_heads=True must be an integer"),
        ({"key_rank": 0}, ValueError, "key_rank=0 must be at least 1"),
        ({"key_rank": -2}, ValueError, "key_rank=-2 must be at least 1"),
        ({"key_rank": "8"}, TypeError, "key_rank='8' must be an integer"),
        ({"num_heads": 2, "key_rank": 4}, ValueError, "num_heads=2 and key_rank=4 contradict"),
        ({"gate": 1}, TypeError, "gate=1 must be True or False"),
        ({"gate": True, "output": "mean"}, ValueError, "gate=True adds to the running sum, and output='mean'"),
        ({"recency_bias": float("nan")}, ValueError, "recency_bias=nan must be finite"),
        ({"recency_bias": float("-inf")}, ValueError, "recency_bias=-inf must be finite"),
        ({"recency_bias": 1e5}, ValueError, "within 10000 of zero"),
        ({"recency_bias": "2"}, TypeError, "recency_bias='2' must be a number"),
        ({"num_heads": 2, "schedule": "two_phase"}, ValueError, "'two_phase' has no form for num_heads=2"),
        ({"key_rank": 2, "schedule": "two_phase"}, ValueError, "'two_phase' has no form for key_rank=2"),
    ],
)
def test_wrong_choices_name_the_field_and_the_value(fields, error, message):
    with pytest.raises(error, match=message):
        ar.AttnResConfig(**fields)


def test_a_config_is_a_value():
    assert ar.AttnResConfig(num_blocks=3) == ar.AttnResConfig(num_blocks=3)
    with pytest.raises(AttributeError):
        ar.AttnResConfig().eps = 1.0


def test_a_config_without_variants_is_described_as_before_there_were_any():
    assert set(describe_config(ar.AttnResConfig(block_size=2))) == {
        "num_blocks", "block_size", "output", "key_norm", "eps", "schedule", "param_dtype", "block_layers",
    }  # fmt: skip


@pytest.mark.parametrize(
    "variant",
    [{}, {"num_heads": 4}, {"key_rank": 8, "gate": True}, {"recency_bias": 2}, {"gate": True, "recency_bias": -0.5}],
)
def test_what_was_described_comes_back(variant):
    config = ar.AttnResConfig(**variant)
    facts = describe_config(config)
    assert variant.items() <= facts.items()
    assert config_from(facts) == config


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ({}, {"query": 16, "key_norm": 16}),
        ({"num_heads": 4, "key_norm": False}, {"query": 16}),
        ({"key_rank": 5}, {"query": 5, "key_norm": 5}),
        ({"key_rank": 5, "gate": True, "recency_bias": 1.0}, {"query": 5, "key_norm": 5, "gate": 16}),
    ],
)
def test_parameters_of_a_read(variant, sizes):
    assert list(ar.AttnResConfig(**variant).parameter_sizes(16).items()) == list(sizes.items())


def test_which_start_as_the_original():
    assert ar.AttnResConfig(num_heads=2).starts_as_original
    assert ar.AttnResConfig(gate=True, recency_bias=3.0).starts_as_original
    assert not ar.AttnResConfig(recency_bias=3.0).starts_as_original
