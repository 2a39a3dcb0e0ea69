"""The queries and gains of a model's reads: to hand to an optimizer, to load alone."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from attnres_rewrite.errors import ArtifactError, NotAttachedError, explain


def attnres_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the queries and gains of every read, [D] each, in the order of `model.named_parameters()`.

    They want an optimizer group of their own: no weight decay, which would pull gains to zero, and a learning rate of
    their own.

    Args:
        model: An attached model, the result of `rewrite`, or a module that holds either.

    Raises:
        NotAttachedError: There are none.
    """
    return list(_named(model).values())


def load_attnres_parameters(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> None:
    """Load the queries and gains, and nothing else, from a checkpoint.

    transformers drops them in from_pretrained(), which builds the model before attach() can add them.

    Args:
        model: An attached model, or the result of `rewrite`.
        source: A state dict, a safetensors file, or a folder of such files.

    Raises:
        ArtifactError: The checkpoint lacks one of them, has one that the model lacks, or of another shape.
        NotAttachedError: The model has none.
    """
    wanted = _named(model)
    found = source if isinstance(source, Mapping) else _read(Path(source))
    found = {name: value for name, value in found.items() if _is_of_read(name)}
    for missing, which in ((wanted.keys() - found.keys(), "lacks"), (found.keys() - wanted.keys(), "has")):
        if missing:
            raise ArtifactError(
                explain(
                    f"the checkpoint {which} {sorted(missing)[0]}, one of {len(missing)} queries and gains",
                    None if isinstance(source, Mapping) else str(source),
                    f"The model has {len(wanted)} of them, the checkpoint {len(found)}.",
                    "It was attached or rewritten from another model, or not at all.",
                )
            )
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            raise ArtifactError(f"{name} is {list(found[name].shape)} in the checkpoint, {list(parameter.shape)} here")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def holds_attnres_parameters(folder: Path) -> bool:
    """Say whether the safetensors files of a folder hold queries."""
    return any(_is_of_read(name) for path in folder.glob("*.safetensors") for name in _names(path))


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {name: parameter for name, parameter in model.named_parameters() if _is_of_read(name)}
    if not found:
        raise NotAttachedError(
            explain(f"{type(model).__name__} has no reads", remedy="Add them: attnres_rewrite.attach(model, config)")
        )
    return found


def _is_of_read(name: str) -> bool:
    path = name.split(".")
    return len(path) >= 3 and path[-3] == "attn_res" and path[-2].isdigit() and path[-1] in ("query", "key_norm")


def _read(path: Path) -> dict[str, Tensor]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ArtifactError(f"{path} holds no safetensors file")
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            found |= {name: weights.get_tensor(name) for name in weights.keys() if _is_of_read(name)}  # noqa: SIM118
    return found


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as weights:
        return list(weights.keys())
