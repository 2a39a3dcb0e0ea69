"""Which checkpoint of a folder a transformers model was read from: its queries are the ones to load.

from_pretrained() leaves queries out, and the model remembers the folder alone: not the subfolder, nor the variant, nor
that it was made from the config and read no weights. So its own weights are looked for in each checkpoint there.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from attnres_rewrite.errors import ArtifactError
from attnres_rewrite.read_parameters import (
    by_plain_name,
    load_attnres_parameters,
    named_reads,
    opened,
    read_files,
)

_SHARD = re.compile(r"-\d+-of-\d+")
# a model whose head was drawn anew, or whose vocabulary has grown, is still the one that was read
_ALIKE = 0.9
_ROWS = 8


@dataclass(frozen=True, slots=True)
class _Found:
    """Queries that fit a model: of a checkpoint, under a prefix where the model is a part of what was saved."""

    files: tuple[Path, ...]
    prefix: str
    queries: Mapping[str, Tensor]
    alike: float | None  # the share of the weights that are the model's; None where none could be compared


def load_saved_reads(model: nn.Module, folder: Path) -> None:
    """Load the queries and gains of the checkpoint that `model` was read from, or warn that there is none.

    Raises:
        ArtifactError: The folder has queries of other reads, or a damaged file.
    """
    found = [
        each for files in _checkpoints(folder) for each in _that_fit(model, files, strict=files[0].parent == folder)
    ]
    if not found:
        load_attnres_parameters(model, folder)  # which says what does not fit
        return
    compared = [each.alike for each in found if each.alike is not None]
    if compared:
        found = [each for each in found if each.alike == max(compared) >= _ALIKE]
    if not found or len({each.prefix for each in found}) > 1:
        warnings.warn(
            f"attnres_rewrite: {folder} has queries, and the weights of this {type(model).__name__} are those of no "
            "checkpoint there; its queries are zero. Load them with load_attnres_parameters(model, file)",
            stacklevel=3,
        )
        return
    first, *others = found
    load_attnres_parameters(model, first.queries)
    if other := next((other for other in others if not _same(first.queries, other.queries)), None):
        warnings.warn(
            f"attnres_rewrite: the queries are those of {first.files[0]}; {other.files[0]} has the same weights and "
            "other queries, which load_attnres_parameters(model, file) loads",
            stacklevel=3,
        )


def _checkpoints(folder: Path) -> Iterator[tuple[Path, ...]]:
    """Yield the files of each checkpoint, shards together: of the folder, the one without variant first, then below."""
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        files: dict[str, list[Path]] = {}
        for path in sorted(place.glob("*.safetensors")):
            files.setdefault(_SHARD.sub("", path.name), []).append(path)
        for name in sorted(files, key=lambda name: (name != "model.safetensors", name)):
            yield tuple(files[name])


def _that_fit(model: nn.Module, files: Sequence[Path], *, strict: bool) -> Iterator[_Found]:
    """Yield the queries of a checkpoint that are those of `model`, under every prefix where they are."""
    try:
        queries = by_plain_name(read_files(files))
    except ArtifactError:
        if strict:
            raise
        return
    wanted = named_reads(model)
    one = next(iter(wanted))
    prefixes = {name.removesuffix(one) for name in queries if name == one or name.endswith(f".{one}")}
    for prefix in sorted(prefixes, key=len):
        under = {name.removeprefix(prefix): value for name, value in queries.items() if name.startswith(prefix)}
        if under.keys() == wanted.keys() and all(under[name].shape == wanted[name].shape for name in wanted):
            yield _Found(tuple(files), prefix, under, _alike(model, files, prefix))


@torch.no_grad()
def _alike(model: nn.Module, files: Sequence[Path], prefix: str) -> float | None:
    """Return the share of the matrices in `files` whose beginnings are those of the model's own."""
    own = {
        prefix + name: value
        for name, value in model.named_parameters()
        # vectors are norms, often all ones
        if value.ndim > 1 and value.is_floating_point() and not value.is_meta and not hasattr(value, "placements")
    }
    same: list[bool] = []
    with ExitStack() as stack:
        for weights in [stack.enter_context(opened(file)) for file in files]:
            for name in own.keys() & set(weights.keys()):
                saved, value = weights.get_slice(name), own[name]
                if list(saved.get_shape()) == list(value.shape):
                    rows = slice(_ROWS if value.ndim == 2 else 1)
                    same.append(torch.equal(saved[rows].to(value.dtype), value[rows].cpu()))
    return sum(same) / len(same) if same else None


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)
