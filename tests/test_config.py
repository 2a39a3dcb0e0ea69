"""Mirrors attnres_rewrite/config.py."""

import pytest
import torch

import attnres_rewrite as ar


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
        ({"eps": 0.0}, ValueError, "eps=0.0 must be positive"),
        ({"param_dtype": torch.int32}, ValueError, "not a floating-point dtype"),
    ],
)
def test_wrong_choices_name_the_field_and_the_value(fields, error, message):
    with pytest.raises(error, match=message):
        ar.AttnResConfig(**fields)


def test_a_config_is_a_value():
    assert ar.AttnResConfig(num_blocks=3) == ar.AttnResConfig(num_blocks=3)
    with pytest.raises(AttributeError):
        ar.AttnResConfig().eps = 1.0
