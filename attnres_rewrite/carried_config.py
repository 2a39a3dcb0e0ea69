"""The config that a transformers model carries: which AttnResConfig it was attached with, saved in its config.json.

attach(model, config)  ->  model.config.attn_res == {"num_blocks": 4, ...}, and so save_pretrained() writes it
"""

import copy
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from attnres_rewrite.config import AttnResConfig, config_from, describe_config
from attnres_rewrite.errors import ArtifactError, explain
from attnres_rewrite.example_inputs import is_huggingface
from attnres_rewrite.read_parameters import holds_attnres_parameters

_KEY = "attn_res"


def folder_with_queries(model: Any) -> Path | None:
    """Return the folder that from_pretrained() read, when it holds queries; the model had no place for them."""
    if not is_huggingface(model) or not model.name_or_path:
        return None
    folder = Path(model.name_or_path)
    return folder if folder.is_dir() and holds_attnres_parameters(folder) else None


def config_for(model: Any, config: AttnResConfig | None, folder: Path | None) -> AttnResConfig:
    """Return the config to attach with: the given one, or the one that a transformers config carries.

    Raises:
        ArtifactError: There are queries, and nothing says what they belong to.
        ValueError: Both are there, and differ.
    """
    carried = getattr(model.config, _KEY) if carries_config(model) else None
    try:
        own = None if carried is None else config_from(carried)
    except TypeError as error:
        raise ArtifactError(
            explain(
                f"attn_res in the config of this {type(model).__name__} is of another release",
                None,
                f"{error}. It holds {carried}.",
            )
        ) from error
    if own is not None and config is not None and own != config:
        given, saved = _differences(config, own), _differences(own, config)
        raise ValueError(f"{given} contradicts the config this model was saved with, {saved}: leave it out")
    if own is None and config is None and folder is not None:
        raise ArtifactError(
            explain(
                f"the queries of this {type(model).__name__} were saved, and the config they belong to was not",
                str(folder),
                "Its config.json has no attn_res, or from_pretrained() was given another config.",
                "Give the config of the training run, attach(model, config); the queries are then loaded.",
            )
        )
    if own is not None and folder is None:
        warnings.warn(
            "attnres_rewrite: this model was saved with queries, which from_pretrained() left out, and they are zero "
            "now; load them with load_attnres_parameters(model, folder)",
            stacklevel=3,
        )
    return config or own or AttnResConfig()


def _differences(one: AttnResConfig, other: AttnResConfig) -> str:
    """Spell the fields of one config in which another differs."""
    names = [field.name for field in fields(one) if getattr(one, field.name) != getattr(other, field.name)]
    return ", ".join(f"{name}={getattr(one, name)!r}" for name in names)


def carries_config(model: Any) -> bool:
    """Say whether the config of a transformers model is that of an attached one, which this may be or may have been."""
    return is_huggingface(model) and getattr(model.config, _KEY, None) is not None


def warn_of_lost_reads(model: Any) -> None:
    """Warn where what is rewritten was trained with reads that it lacks now: the new ones are zero."""
    if carries_config(model):
        warnings.warn(
            f"attnres_rewrite: this {type(model).__name__} was saved with queries, which from_pretrained() left out, "
            "and is rewritten with zero ones; attach(model) loads them, and as_rewritten(model) is its rewrite",
            stacklevel=3,
        )


def note_config(model: Any, config: AttnResConfig) -> None:
    """Note the config where transformers saves it: in a copy, because other models may share the object."""
    if not is_huggingface(model):
        return
    shared, own = model.config, copy.copy(model.config)
    setattr(own, _KEY, describe_config(config))
    for part in model.modules():
        for name in [name for name, value in vars(part).items() if value is shared]:
            setattr(part, name, own)


def forget_config(model: Any) -> None:
    """Undo `note_config`."""
    if is_huggingface(model):
        model.config.__dict__.pop(_KEY, None)
