"""Every language-model and image-classification class of the installed transformers, made tiny."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from tests.zoo.spec import BATCH, Inputs, Spec, noise, redraw, token_ids
from tests.zoo.sweep_overrides import OVERRIDES, SPECIAL_INPUTS
from tests.zoo.tiny_config import tiny_config

TASKS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
# below the special tokens of tiny_config
FED_VOCAB = 90
LENGTH = 16


def sweep() -> tuple[Spec, ...]:
    """Return one entry a class, in the order of the library's own tables."""
    return tuple(Spec(name, task, partial(build, name), partial(inputs, name, task)) for name, task in _classes())


def _classes() -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for task, table in TASKS.items():
        for names in getattr(modeling_auto, table).values():
            for name in (names,) if isinstance(names, str) else names:
                if name not in seen:
                    seen.add(name)
                    yield name, task


def config_of(name: str) -> PreTrainedConfig:
    """Return the tiny configuration of a model class."""
    config_class: type[PreTrainedConfig] = getattr(transformers, name).config_class
    return tiny_config(config_class, OVERRIDES.get(config_class.model_type, {}) | OVERRIDES.get(name, {}))


def build(name: str) -> nn.Module:
    """Build a model class at random weights, without a cache and with plain attention."""
    config = without_cache(config_of(name))
    config._attn_implementation = "eager"
    return redraw(getattr(transformers, name)(config))


def without_cache(config: PreTrainedConfig) -> PreTrainedConfig:
    """Turn `use_cache` off, in nested configurations too."""
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            without_cache(value)
    return config


def inputs(name: str, task: str) -> Inputs:
    """Return what the class takes first, and decoder ids for an encoder-decoder."""
    config, main = config_of(name), getattr(transformers, name).main_input_name
    if name in SPECIAL_INPUTS:
        return SPECIAL_INPUTS[name]()
    images = task == "image-classification" and main == "inputs"
    fed = {main: _pixels(config) if images else _MAIN_INPUTS[main](config)}
    if config.is_encoder_decoder:
        fed["decoder_input_ids"] = token_ids(8, FED_VOCAB, seed=2)
    return fed


def _pixels(config: PreTrainedConfig) -> Any:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return noise(BATCH, getattr(config, "num_channels", 3), height, width)


def _ids(config: PreTrainedConfig) -> Any:
    # musicgen takes one row per codebook
    return token_ids(LENGTH, FED_VOCAB, rows=BATCH * getattr(config, "num_codebooks", 1))


def _features(config: PreTrainedConfig) -> Any:
    return noise(BATCH, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 64))


_MAIN_INPUTS: dict[str, Callable[[PreTrainedConfig], Any]] = {
    "input_ids": _ids,
    "inputs": _ids,
    "pixel_values": _pixels,
    "input_features": _features,
}
