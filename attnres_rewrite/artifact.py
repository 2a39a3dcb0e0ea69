"""Save a rewritten model in a folder, and load it without running anybody's code.

attnres.json         format, versions, config, mode, the hash of the source graph, and a SHA-256 of every other file
program.json         the graphs of each mode (original and rewritten), the plans, and the table of tensors
weights.safetensors  parameters, buffers and constants, tied ones once
inputs.safetensors   the example inputs, so that `verify` can run the proofs again
report.json          what was found, planned and proved

A folder is written under another name and renamed when it is whole. Nothing is unpickled on the way back.
"""

import hashlib
import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from attnres_rewrite.config import config_from
from attnres_rewrite.errors import ArtifactError, explain, saying_what_cannot_be_written
from attnres_rewrite.graph_json import graph_from_json, graph_to_json
from attnres_rewrite.inputs import flat_inputs
from attnres_rewrite.model_caches import register_dynamic_cache
from attnres_rewrite.module import ExampleInputs, RewrittenModule, moved_program, require_rewritten
from attnres_rewrite.moving import move_attributes
from attnres_rewrite.program_json import program_from_json, program_to_json
from attnres_rewrite.report import RewriteReport, report_from_dict
from attnres_rewrite.tensor_tree import add_tensors, holder_of, tensors_of
from attnres_rewrite.whole_folder import whole_folder

FORMAT, FORMAT_VERSION = "attnres-rewrite", 1
HEADER = "attnres.json"
MODES = {"eval": False, "train": True}
FILES = {"program.json", "weights.safetensors", "inputs.safetensors", "report.json"}


def save(new: RewrittenModule, folder: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write `new` to `folder`, all of it or nothing.

    Args:
        new: The result of `rewrite` or `load`.
        folder: Must not exist, unless `force`.
        force: Replace an earlier save; anything else that is there is left alone.

    Returns:
        The absolute path of the folder.

    Raises:
        ArtifactError: The folder exists, or the model holds something that cannot be saved.
        TypeError: `new` is no rewrite.
    """
    require_rewritten(new, "save")
    target = Path(folder).absolute()
    _refuse_meta(new)
    _refuse_to_overwrite(target, force)
    with saying_what_cannot_be_written("the folder", target), whole_folder(target) as draft:
        _write(new, draft)
    return target


def _refuse_meta(new: RewrittenModule) -> None:
    for name, value in new.state_dict().items():
        if value.is_meta:
            raise ArtifactError(
                explain(
                    f"{name} is on the meta device, and has no values to save", None, "", "Save it with its weights."
                )
            )


def _refuse_to_overwrite(target: Path, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise ArtifactError(
            explain("the folder exists", str(target), "", "Give another name, or force=True (--force).")
        )
    if not (target / HEADER).is_file():
        raise ArtifactError(
            explain(
                "what is there is not a saved rewrite, and is not replaced",
                str(target),
                f"It has no {HEADER}.",
                "Give another name, or remove it yourself.",
            )
        )


def _write(new: RewrittenModule, draft: Path) -> None:
    tensors, table = tensors_of(new)
    safetensors.torch.save_file(tensors, draft / "weights.safetensors")
    programs = {id(program): program for program in new.programs.values()}
    order = list(programs)
    leaves = flat_inputs(next(iter(programs.values())).original, new.example_inputs.args, new.example_inputs.kwargs)
    inputs = {str(index): leaf.detach().contiguous() for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    safetensors.torch.save_file({name: value.clone() for name, value in inputs.items()}, draft / "inputs.safetensors")
    facts = {
        "modes": {name: order.index(id(new.programs[mode])) for name, mode in MODES.items() if mode in new.programs},
        "programs": [program_to_json(program) for program in programs.values()],
        "bodies": {name: graph_to_json(body.graph) for name, body in _bodies_of(new)},
        "tensors": table,
        "inputs": [None if isinstance(leaf, Tensor) else _number_to_json(leaf) for leaf in leaves],
    }
    _write_json(draft / "program.json", facts)
    _write_json(draft / "report.json", new.report.to_dict())
    source = json.dumps([graph_to_json(program.original) for program in programs.values()], sort_keys=True)
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "torch": torch.__version__,
        "config": new.report.config,
        "training": new.training,
        "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "files": {path.name: _sha256(path) for path in sorted(draft.iterdir())},
    }
    _write_json(draft / HEADER, header)


def _number_to_json(leaf: Any) -> Any:
    """Spell what JSON has no number for, such as the infinity that fills a mask."""
    return {"float": str(leaf)} if isinstance(leaf, float) and not math.isfinite(leaf) else leaf


def _number_from_json(value: Any) -> Any:
    return float(value["float"]) if isinstance(value, dict) else value


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, allow_nan=False, separators=(",", ":")))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bodies_of(new: nn.Module) -> Iterator[tuple[str, fx.GraphModule]]:
    """Yield the bodies of higher-order ops, inner ones last."""
    for name, module in new.named_modules(remove_duplicate=False):
        if name and isinstance(module, fx.GraphModule):
            yield name, module


def load(folder: str | os.PathLike[str], device: torch.device | str | None = None) -> RewrittenModule:
    """Read a saved rewrite; no pickle, no code of the model.

    The folder is checked whole before anything is built. Import the library that defines the model's output class
    first where it has one of its own; transformers is imported when needed.

    Args:
        folder: What `save` wrote.
        device: Where the model shall be; None is where it was when it was saved.

    Raises:
        ArtifactError: The folder is no saved rewrite, is damaged, or is of a newer format.
    """
    path = Path(folder).absolute()
    header = _checked_header(path)
    try:
        return _build(path, header, None if device is None else torch.device(device))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, SafetensorError) as why:
        raise ArtifactError(
            explain(
                "the saved rewrite cannot be read",
                str(path),
                f"{type(why).__name__}: {why}",
                "Save it again.",
            )
        ) from why


def _checked_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads((path / HEADER).read_text())
    except (OSError, ValueError, RecursionError) as why:
        raise ArtifactError(
            explain("not a saved rewrite", str(path), f"{HEADER}: {why}", "Save one with attnres_rewrite.save.")
        ) from why
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ArtifactError(explain("not a saved rewrite", str(path), f"{HEADER} names another format."))
    if header.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            explain(
                f"the saved rewrite has format {header.get('format_version')}; this release reads {FORMAT_VERSION}",
                str(path),
                "",
                "Use the release that wrote it, or rewrite the model again.",
            )
        )
    digests = header.get("files")
    if not isinstance(digests, dict) or digests.keys() != FILES:
        raise ArtifactError(
            explain(
                f"{HEADER} does not have the checksums of {', '.join(sorted(FILES))}", str(path), "", "Save it again."
            )
        )
    for name, digest in digests.items():
        file = path / name
        if not file.is_file() or _sha256(file) != digest:
            state = "is damaged or was changed" if file.is_file() else "is missing"
            raise ArtifactError(explain(f"{name} {state}", str(path), "", "Copy the folder again, or save it again."))
    return header


def _build(path: Path, header: dict[str, Any], device: torch.device | None) -> RewrittenModule:
    facts = json.loads((path / "program.json").read_text())
    _import_output_classes(facts)
    if device is None:
        _refuse_missing_devices(path, facts)
    tree = _tree_of_bodies(facts["bodies"])
    add_tensors(tree, facts["tensors"], safetensors.torch.load_file(path / "weights.safetensors"), device)
    programs = [program_from_json(program) for program in facts["programs"]]
    if device is not None:
        programs = [moved_program(program, device) for program in programs]
        move_attributes(tree, [program.graph for program in programs], device)
    for program in programs:
        for graph in (program.graph, program.original):
            graph.owning_module = None
    modes = {MODES[name]: dict(enumerate(programs))[index] for name, index in facts["modes"].items()}
    if header["training"] not in modes:
        raise ValueError(f"the model was saved with training {header['training']}, and has no program for that")
    report: RewriteReport = report_from_dict(json.loads((path / "report.json").read_text()))
    inputs = safetensors.torch.load_file(path / "inputs.safetensors")
    leaves = [inputs.get(str(index), _number_from_json(value)) for index, value in enumerate(facts["inputs"])]
    example = _example_inputs(programs[0].original, leaves)
    if device is not None:
        example = example.on(device)
    return RewrittenModule(tree, modes, header["training"], config_from(header["config"]), report, example)


def _refuse_missing_devices(path: Path, facts: Mapping[str, Any]) -> None:
    """Raise ArtifactError where this machine lacks a device that the graphs name, and their tensors are on."""
    for device in sorted({entry["device"] for entry in facts["tensors"].values()}):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as why:
            raise ArtifactError(
                explain(
                    f"the saved rewrite is on {device}, which this machine has not",
                    str(path),
                    "",
                    'Say where it shall be: attnres_rewrite.load(folder, device="cpu"), or --device cpu.',
                )
            ) from why


def _import_output_classes(facts: Mapping[str, Any]) -> None:
    """Register the output classes of transformers, whose names appear in the calling convention."""
    if any(
        "transformers." in str(program[name]["call"]) for program in facts["programs"] for name in ("graph", "original")
    ):
        try:
            importlib.import_module("transformers.modeling_outputs")
        except ImportError as why:
            raise ArtifactError("the saved model returns a class of transformers, which is not installed") from why
        register_dynamic_cache()


def _tree_of_bodies(bodies: Mapping[str, Any]) -> nn.Module:
    tree = nn.Module()
    for name, body in bodies.items():
        parent, _, leaf = name.rpartition(".")
        holder_of(tree, parent).add_module(leaf, fx.GraphModule(nn.Module(), graph_from_json(body)[0]))
    return tree


def _example_inputs(graph: fx.Graph, leaves: list[Any]) -> ExampleInputs:
    info = getattr(graph._codegen, "pytree_info", None)
    if info is None:
        return ExampleInputs(tuple(leaves), {})
    args, kwargs = pytree.tree_unflatten(leaves, info.in_spec)
    return ExampleInputs(tuple(args), dict(kwargs))
