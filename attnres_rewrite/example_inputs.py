"""Example inputs for a transformers model, made from its config: ids, an image, or sound.

transformers itself is not imported.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from attnres_rewrite.errors import ModelSpecError, explain

NUM_FRAMES = 16_000  # a second of audio


def is_huggingface(model: object) -> bool:
    """Say whether `model` is a transformers model, without importing transformers."""
    return any(f"{cls.__module__}.{cls.__name__}" == _BASE for cls in type(model).__mro__)


_BASE = "transformers.modeling_utils.PreTrainedModel"


def example_inputs(model: Any, batch: int, seq: int) -> dict[str, Any]:
    """Make inputs for a transformers model, by name: ids, an image, or sound, on the model's device.

    Args:
        model: A transformers model.
        batch: First size of every input.
        seq: Tokens of each sequence of ids, encoder and decoder alike.

    Raises:
        ModelSpecError: The model wants an input of another kind.
    """
    # torch.manual_seed would seed every GPU, too
    draw = torch.Generator().manual_seed(0)
    make = {
        "input_ids": lambda: _ids(model, batch, seq, draw),
        "pixel_values": lambda: _image(model, batch, draw),
        "input_features": lambda: _spectrogram(model, batch, draw),
        "input_values": lambda: _normal(model, (batch, NUM_FRAMES), draw),
    }
    main = model.main_input_name
    if main not in make:
        raise ModelSpecError(
            explain(
                f"{type(model).__name__} wants {main}, which cannot be made up",
                remedy="Give example inputs; on the command line, by a FILE.py with a factory.",
            )
        )
    inputs = {main: make[main]()}
    wanted = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder and "decoder_input_ids" in wanted:
        inputs["decoder_input_ids"] = _ids(model, batch, seq, draw)
    return inputs


def _ids(model: Any, batch: int, seq: int, draw: torch.Generator) -> Any:
    """Draw ids that stand for words: padding would be masked, and an image token wants an image."""
    size = model.config.get_text_config().vocab_size
    special = _special_ids(model.config)
    words = [token for token in range(size) if token not in special] or list(range(size))
    drawn = torch.randint(len(words), (batch, seq), device="cpu", generator=draw)
    return torch.tensor(words, device="cpu")[drawn].to(model.device)


def _special_ids(config: Any) -> set[int]:
    special: set[int] = set()
    for part in with_parts(config):
        for name, value in part.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                special |= {token for token in (value if isinstance(value, list) else [value]) if token}
    return special | {0}


def _image(model: Any, batch: int, draw: torch.Generator) -> Any:
    config = getattr(model.config, "vision_config", None) or model.config
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return _normal(model, (batch, getattr(config, "num_channels", 3), height, width), draw)


def _spectrogram(model: Any, batch: int, draw: torch.Generator) -> Any:
    config = model.config
    bins = getattr(config, "num_mel_bins", 80)
    # Whisper's convolutions halve the frames before they meet the positions
    return _normal(model, (batch, bins, 2 * getattr(config, "max_source_positions", 1500)), draw)


def _normal(model: Any, shape: tuple[int, ...], draw: torch.Generator) -> Any:
    return torch.randn(shape, device="cpu", generator=draw).to(model.device, model.dtype)


def with_parts(config: Any) -> Iterator[Any]:
    """Yield `config` and the configs nested in it."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None and not isinstance(part, dict):
            yield from with_parts(part)
