"""A MODEL argument -> the model, and example inputs to capture it with.

FILE.py[:factory], package.module:factory    what the factory returns; runs that code
a folder with config.json                    a Hugging Face model, see huggingface.py; one that was attached when it
                                             was saved is trained
X.pt2                                        an exported program and its own example inputs; may unpickle
a folder with attnres.json                   a saved rewrite
"""

import importlib
import importlib.util
import inspect
import sys
import traceback
import zipfile
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

from attnres_rewrite.errors import ModelSpecError, explain

DEFAULT_FACTORIES = ("build", "model", "make_model", "get_model")
BATCH, SEQ = 2, 16
FORMS = "MODEL is FILE.py[:factory], package.module:factory, a folder with a config.json, X.pt2, or a saved rewrite."
RETURNS = "A factory returns a module, or (module, args), or (module, args, kwargs)."


Kind = Literal["original", "rewrite", "attached", "trained"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, the inputs to capture it with, and what its user should know about it.

    kind: "original"; "rewrite", what `save` wrote or rewrite() returned; "attached", by attach(); or "trained", an
    original whose folder has queries for it.
    """

    model: Any  # nn.Module or torch.export.ExportedProgram
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()
    kind: Kind = "original"


def load(
    spec: str, *, meta: bool = False, batch: int | None = None, seq: int | None = None, device: Any = None
) -> Loaded:
    """Load what `spec` names.

    Args:
        spec: The MODEL argument.
        meta: Build a Hugging Face model on the meta device, without its weights.
        batch: Of the example inputs made for a Hugging Face model.
        seq: Sequence length of those inputs, in tokens.
        device: Where a saved rewrite is loaded to, a torch.device; None is where it was. Others come as they are.

    Raises:
        ModelSpecError: `spec` is well formed, and what it names gives no model.
        ValueError: `spec` is not well formed, names no file, or an option does not apply to it.
    """
    path = Path(spec)
    if path.is_dir() and not is_artifact(spec):
        return _load_folder(path, meta, batch, seq)
    if meta:
        raise ValueError(f"--meta builds a Hugging Face folder from its config.json; {spec} is none")
    sized = batch is not None or seq is not None
    if is_artifact(spec):
        _refuse_sizes(sized, spec)
        import attnres_rewrite as ar

        return Loaded(ar.load(path, device), kind="rewrite")
    if path.suffix == ".pt2":
        _refuse_sizes(sized, spec)
        return _load_exported(path)
    return _load_factory(spec, batch, seq)


def is_artifact(spec: str) -> bool:
    """Say whether `spec` is a folder that `save` wrote."""
    return (Path(spec) / "attnres.json").is_file()


def name_of(spec: str) -> str:
    """Name what `spec` loads, for a file to be called after it: "examples/gpt.py:build" -> "gpt"."""
    location, _ = _split(spec)
    path = Path(location)
    if path.suffix in (".py", ".pt2"):
        return path.stem
    return path.resolve().name if path.is_dir() else location.rpartition(".")[2]


def _split(spec: str) -> tuple[str, str | None]:
    location, colon, factory = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, None
    return location, factory


def _refuse_sizes(sized: bool, spec: str) -> None:
    if sized:
        raise ValueError(f"--batch and --seq size the inputs made for Hugging Face models; {spec} has its own")


def _load_folder(path: Path, meta: bool, batch: int | None, seq: int | None) -> Loaded:
    if not (path / "config.json").is_file():
        raise ModelSpecError(
            explain(
                f"{path} holds no model",
                why="It has neither a config.json (Hugging Face) nor an attnres.json (a saved rewrite).",
                remedy=FORMS,
            )
        )
    from attnres_rewrite.carried_config import carries_config, folder_with_queries
    from attnres_rewrite.cli import huggingface
    from attnres_rewrite.example_inputs import example_inputs

    model, notes = huggingface.build(path, meta=meta)
    inputs = example_inputs(model, batch or BATCH, seq or SEQ)
    if carries_config(model) or folder_with_queries(model) is not None:
        notes = (*notes, f"{path} was trained with Attention Residuals: what follows is of its own reads")
        return Loaded(model, (), inputs, notes, "trained")
    return Loaded(model, (), inputs, notes)


def _load_exported(path: Path) -> Loaded:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise ModelSpecError(explain(f"{path} is no exported program", why="It is no archive, or cut short."))
    import torch

    try:
        program = torch.export.load(path)
    except Exception as error:
        why = f"torch.export.load: {_brief(error)}"
        raise ModelSpecError(explain(f"{path} is no exported program", why=why)) from error
    return _with_own_inputs(str(path), program)


def _with_own_inputs(spec: str, program: Any) -> Loaded:
    """Take the inputs that an exported program keeps."""
    if program.example_inputs is None:
        raise ModelSpecError(
            explain(f"{spec} keeps no example inputs", remedy="Export it again with torch.export.export.")
        )
    args, kwargs = program.example_inputs
    return Loaded(program, tuple(args), dict(kwargs))


def _load_factory(spec: str, batch: int | None, seq: int | None) -> Loaded:
    location, factory = _split(spec)
    path = Path(location)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise ValueError(f"there is no file {path}")
    if factory is not None and not factory.isidentifier():
        raise ValueError(f"{spec} does not parse: {factory!r} names no factory. {FORMS}")
    if not is_file and (factory is None or not all(part.isidentifier() for part in location.split("."))):
        seen = "is a file of another kind" if path.is_file() else "is no file or folder, and does not parse"
        raise ValueError(f"{spec} {seen}. {FORMS}")
    module = _import_file(path) if is_file else _import_module(location)
    return _from_factory(spec, module, _pick_factory(module, location, factory), batch, seq)


def _import_file(path: Path) -> ModuleType:
    # as `python FILE.py` does, so that the file can import its neighbours
    _add_to_path(path.resolve().parent)
    name = f"attnres_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses and typing look their module up by name
    sys.modules[name] = module
    with _blaming(f"{path} cannot be imported"):
        spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    # as `python -m` does
    _add_to_path(Path.cwd())
    with _blaming(f"module {name} cannot be imported"):
        return importlib.import_module(name)


def _add_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _pick_factory(module: ModuleType, location: str, name: str | None) -> Any:
    names = DEFAULT_FACTORIES if name is None else (name,)
    for candidate in names:
        if hasattr(module, candidate):
            return getattr(module, candidate)
    wanted = "factory called " + " or ".join(names) if name is None else name
    defined = ", ".join(_callables(module)) or "no function and no class"
    example = next(iter(_callables(module)), "factory")
    remedy = f"Name one of them, as in {location}:{example}. {RETURNS}"
    raise ModelSpecError(explain(f"{location} has no {wanted}", why=f"It defines {defined}.", remedy=remedy))


def _callables(module: ModuleType) -> list[str]:
    """List what a module defines and could be called, functions before classes."""
    own = {
        name: value
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    }
    return sorted(own, key=lambda name: isinstance(own[name], type))


def _from_factory(spec: str, module: ModuleType, factory: Any, batch: int | None, seq: int | None) -> Loaded:
    where = _defined_at(factory, module)
    made = _call(spec, factory, where)
    items = cast(tuple[Any, ...], made) if isinstance(made, tuple) else (made,)
    if reason := why_not(items):
        raise ModelSpecError(explain(f"{spec} gives no model", where, reason, RETURNS))
    if len(items) == 1:
        return _with_inputs(spec, items[0], where, batch, seq)
    _refuse_sizes(batch is not None or seq is not None, spec)
    kwargs: dict[str, Any] = items[2] if len(items) == 3 and items[2] is not None else {}
    return Loaded(items[0], items[1], kwargs, kind=_kind_of(items[0]))


def _kind_of(model: Any) -> Kind:
    import attnres_rewrite as ar

    if isinstance(model, ar.RewrittenModule):
        return "rewrite"
    try:
        ar.attnres_parameters(model)
    except ar.NotAttachedError:
        return "original"
    return "attached"


def _call(spec: str, factory: Any, where: str) -> object:
    from torch import nn

    # `model = GPT()` at the top of a file is as good as a factory
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        reason = f"It is a {type(factory).__name__}, not a function."
        raise ModelSpecError(explain(f"{spec} gives no model", where, reason, RETURNS))
    if required := required_arguments(factory):
        reason = f"The factory wants {', '.join(required)}, and is called without arguments."
        raise ModelSpecError(explain(f"{spec} gives no model", where, reason, RETURNS))
    with _blaming(f"{spec} raised"):
        return cast(Callable[[], object], factory)()


def why_not(items: tuple[Any, ...]) -> str | None:
    """Say why what a factory returned is not (model[, args[, kwargs]]), or return None."""
    import torch

    if len(items) not in (1, 2, 3):
        return f"It returned a tuple of {len(items)}."
    if not isinstance(items[0], torch.nn.Module | torch.export.ExportedProgram):
        return f"It returned {_describe(items[0])} where the module belongs."
    if len(items) > 1 and not isinstance(items[1], tuple):
        return f"It returned {_describe(items[1])} where the tuple of args belongs."
    if len(items) > 2 and not isinstance(items[2], dict | None):
        return f"It returned {_describe(items[2])} where the dict of kwargs belongs."
    return None


def _describe(value: object) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"


def _with_inputs(spec: str, model: Any, where: str, batch: int | None, seq: int | None) -> Loaded:
    """Give a model that came alone its inputs."""
    from torch import nn

    from attnres_rewrite.example_inputs import example_inputs, is_huggingface

    kind = _kind_of(model)
    if is_huggingface(model):
        return Loaded(model, (), example_inputs(model, batch or BATCH, seq or SEQ), kind=kind)
    _refuse_sizes(batch is not None or seq is not None, spec)
    if kind == "rewrite":
        return Loaded(model, kind=kind)
    if not isinstance(model, nn.Module):
        return _with_own_inputs(spec, model)
    if required := required_arguments(model.forward):
        raise ModelSpecError(
            explain(
                f"{spec} gives no inputs to trace {type(model).__name__} with",
                where,
                f"Its forward wants {', '.join(required)}.",
                "Return (module, args), args being the tuple of example inputs.",
            )
        )
    return Loaded(model)


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """List the arguments without a default; nothing when the signature is hidden."""
    try:
        parameters: Iterable[inspect.Parameter] = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return []
    named = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in named]


def _defined_at(factory: Any, module: ModuleType) -> str:
    try:
        return f"{inspect.getsourcefile(factory)}:{inspect.getsourcelines(factory)[1]}"
    except (OSError, TypeError):
        return str(module.__file__)


@contextmanager
def _blaming(what: str) -> Generator[None]:
    """Turn whatever the user's code raises into a ModelSpecError with its place in that code."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ModelSpecError(explain(what, where_raised(error), _brief(error))) from error


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def where_raised(error: BaseException) -> str | None:
    """Find the line to look at: the deepest one that is not in an installed package or the importer."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def _is_users(filename: str) -> bool:
    if filename.startswith("<frozen ") or Path(filename) == Path(__file__):
        return False
    library = Path(importlib.__file__ or "").parents[1]
    return "site-packages" not in Path(filename).parts and not Path(filename).is_relative_to(library)
