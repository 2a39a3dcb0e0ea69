"""A Hugging Face folder -> the model.

Only config.json and *.safetensors are read: nothing is downloaded, no code of the folder is run, and
nothing is unpickled.
"""

import importlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from attnres_rewrite.errors import ModelSpecError, explain
from attnres_rewrite.example_inputs import with_parts

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
INDEX = "model.safetensors.index.json"


def build(folder: Path, *, meta: bool) -> tuple[Any, tuple[str, ...]]:
    """Build the model of `folder`, with its weights when it has some.

    Returns:
        The model in eval mode, and notes about it.

    Raises:
        ModelSpecError: The folder names no model that transformers knows, or its weights are damaged.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _no_model(folder, error) from error
    for part in with_parts(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    cls = _architecture(transformers, config)
    if meta:
        return _from_config(folder, cls, config, meta=True), ()
    if weight_files(folder):
        return _from_weights(transformers, folder, cls, config)
    note = f"{folder} holds no weights: every parameter of {cls.__name__} is random"
    return _from_config(folder, cls, config, meta=False), (note,)


def _transformers() -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        remedy = 'Install it: pip install "attnres-rewrite[hf]"'
        raise ModelSpecError(explain("a Hugging Face folder needs transformers", remedy=remedy)) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _no_model(folder: Path, error: Exception) -> ModelSpecError:
    text = (str(error).strip().splitlines() or [""])[0]
    return ModelSpecError(
        explain(
            f"{folder} gives no model",
            str(folder / "config.json"),
            f"{type(error).__name__}: {text}",
            "Code inside a model folder is never run: for such a model, write a FILE.py with a factory.",
        )
    )


def _architecture(transformers: Any, config: Any) -> Any:
    """Choose the class that the config names, else the first auto class that knows the config."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    kinds = ["CausalLM", "Seq2SeqLM", "MaskedLM", "ImageClassification"]
    if getattr(config, "is_encoder_decoder", False):
        kinds.insert(0, kinds.pop(1))
    for auto in (*(f"AutoModelFor{kind}" for kind in kinds), "AutoModel"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            # a few configs map to several classes
            return cast(Any, found)[0] if isinstance(found, tuple | list) else found
    raise ModelSpecError(explain(f"transformers has no model class for {type(config).__name__}"))


def _from_config(folder: Path, cls: Any, config: Any, *, meta: bool) -> Any:
    import torch

    try:
        with torch.device("meta") if meta else nullcontext():
            return cls._from_config(config).eval()
    except Exception as error:
        raise _no_model(folder, error) from error


def _from_weights(transformers: Any, folder: Path, cls: Any, config: Any) -> tuple[Any, tuple[str, ...]]:
    for path in weight_files(folder):
        _check_weights(path)
    # its report of missing keys is a page; the note below says it in a line
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        model, loading = cls.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise _no_model(folder, error) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    missing = sorted(loading["missing_keys"])
    if not missing:
        return model, ()
    return model, (f"{len(missing)} parameters of {cls.__name__} are in no file and random: {missing[0]} ...",)


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of `folder`, as its index names them if it has one.

    Raises:
        ModelSpecError: The weights are there as pickle files only, or the index is damaged.
    """
    index = folder / INDEX
    if index.is_file():
        return _indexed_files(index)
    if found := sorted(folder.glob("*.safetensors")):
        return found
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise ModelSpecError(
            explain(
                f"{folder} holds its weights as pickle files only: {', '.join(pickles)}",
                why="Loading a pickle can run any code.",
                remedy="Save the model again with model.save_pretrained(folder), which writes safetensors.",
            )
        )
    return []


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelSpecError(explain(f"{index} is damaged", why=f"{type(error).__name__}: {error}")) from error
    return sorted(index.parent / str(name) for name in names)


def _check_weights(path: Path) -> None:
    """Read the header of one file, which also tells whether the file is as long as it should be."""
    safetensors = importlib.import_module("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt"):
            return
    except (OSError, safetensors.SafetensorError) as error:
        why = f"{type(error).__name__}: {error}"
        remedy = "Fetch the file again, or remove the weights to work on random ones."
        raise ModelSpecError(explain(f"{path} is damaged", why=why, remedy=remedy)) from error
