"""The queries, gains and gates of a model's reads: to hand to an optimizer, to load alone."""

import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from attnres_rewrite.config import START_VALUES
from attnres_rewrite.errors import ArtifactError, NotAttachedError, explain


def attnres_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the queries, gains and gates of every read, vectors all, in the order of `model.named_parameters()`.

    They want an optimizer group of their own: no weight decay, which would pull gains to zero, and a learning rate of
    their own.

    Args:
        model: An attached model, the result of `rewrite`, or a module that holds either. Of several adapters of
            PEFT it is the active one.

    Raises:
        NotAttachedError: There are none.
    """
    return list(named_reads(model).values())


def load_attnres_parameters(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> None:
    """Load the queries, gains and gates, and nothing else, from a checkpoint.

    transformers drops them in from_pretrained(), which builds the model before attach() can add them.

    Args:
        model: An attached model, or the result of `rewrite`.
        source: A state dict, a safetensors file, or a folder of such files.

    Raises:
        ArtifactError: The checkpoint lacks one of them, has one that the model lacks, or of another shape.
        NotAttachedError: The model has none.
    """
    wanted = named_reads(model)
    found = source if isinstance(source, Mapping) else _read(Path(source))
    found = by_plain_name(found)
    for missing, which in ((wanted.keys() - found.keys(), "lacks"), (found.keys() - wanted.keys(), "has")):
        if missing:
            raise ArtifactError(
                explain(
                    f"the checkpoint {which} {sorted(missing)[0]}, one of {len(missing)} queries and gains",
                    None if isinstance(source, Mapping) else str(source),
                    f"The model has {len(wanted)}, {_first(wanted)}; the checkpoint {len(found)}, {_first(found)}.",
                    "It was attached or rewritten from another model, or not at all.",
                )
            )
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            raise ArtifactError(f"{name} is {list(found[name].shape)} in the checkpoint, {list(parameter.shape)} here")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def by_plain_name(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the queries, gains and gates in a state dict, by the names that attach() gave them.

    Raises:
        ArtifactError: One is there twice.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = _plain_name(name)
        if plain in found:
            raise ArtifactError(
                explain(
                    f"the checkpoint has {plain} twice, the second time as {name}",
                    None,
                    "It is of a model with several adapters of PEFT, each with queries and gains of its own.",
                    "Give those of one adapter.",
                )
            )
        if plain is not None:
            found[plain] = value
    return found


def _first(names: Mapping[str, Tensor]) -> str:
    return f"the first is {sorted(names)[0]}" if names else "none at all"


def holds_attnres_parameters(folder: Path) -> bool:
    """Say whether the safetensors files of a folder hold queries."""
    return any(_plain_name(name) for path in folder.glob("*.safetensors") for name in _names(path))


def named_reads(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the queries, gains and gates by the names that attach() gave them."""
    named = ((_plain_name(name), value) for name, value in model.named_parameters() if _is_active(model, name))
    found = {name: parameter for name, parameter in named if name is not None}
    if not found:
        raise NotAttachedError(
            explain(f"{type(model).__name__} has no reads", remedy="Add them: attnres_rewrite.attach(model, config)")
        )
    return found


def _is_active(model: nn.Module, name: str) -> bool:
    """Say whether a parameter is in use: of several adapters of PEFT, each has its own queries and gains."""
    wrapper, saved, rest = name.rpartition(".modules_to_save.")
    active = getattr(model.get_submodule(wrapper), "active_adapters", None) if saved else None
    return active is None or rest.partition(".")[0] in active


# PEFT wraps a module that it saves with an adapter, modules_to_save=["attn_res"]
# and DistributedDataParallel wraps the model
_OF_READ = re.compile(
    r"(module\.)*(?P<owner>(.*\.)?attn_res)(\.modules_to_save\.[^.]+)?"
    r"(?P<read>\.\d+\.(query|key_norm|gate))"
)

# around layers, from torch.compile and checkpoint_wrapper
_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module)\.")


def _plain_name(name: str) -> str | None:
    """Return the name that attach() gave a query or gain, or None for any other parameter."""
    found = _OF_READ.fullmatch(_WRAPPER.sub("", name))
    return found["owner"] + found["read"] if found else None


def start_value(name: str) -> float | None:
    """Return what every number of a query, a gain or a gate of this name starts as; None for any other parameter."""
    return START_VALUES[name.rpartition(".")[2]] if _plain_name(name) else None


def _read(path: Path) -> dict[str, Tensor]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ArtifactError(f"{path} holds no safetensors file")
    return read_files(files)


def read_files(files: Iterable[Path]) -> dict[str, Tensor]:
    """Return what safetensors files have of queries, gains and gates."""
    found: dict[str, Tensor] = {}
    for file in files:
        with opened(file) as weights:
            found |= {name: weights.get_tensor(name) for name in weights.keys() if _plain_name(name)}  # noqa: SIM118
    return found


def _names(path: Path) -> list[str]:
    with opened(path) as weights:
        return list(weights.keys())


@contextmanager
def opened(path: Path) -> Generator[Any]:
    """Open a safetensors file, or raise ArtifactError."""
    try:
        with safe_open(path, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise ArtifactError(
            explain(
                f"{path} is no safetensors file, or is cut short",
                None,
                str(error),
                "From another kind of file, give what torch.load(path, weights_only=True) returns.",
            )
        ) from error
