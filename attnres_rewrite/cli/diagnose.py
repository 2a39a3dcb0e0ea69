"""attnres-rewrite diagnose: a rewrite and data -> tables, diagnosis.json and plots.

The data file is the user's code: its factory returns an iterable of batches, or (batches, loss_fn).
"""

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, cast

import typer

import attnres_rewrite as ar
from attnres_rewrite.cli import load, options, render
from attnres_rewrite.cli.device import moved
from attnres_rewrite.cli.exit_codes import exit_code_of
from attnres_rewrite.cli.rewriting import rewritten
from attnres_rewrite.cli.targets import refuse_unwritable_folder
from attnres_rewrite.errors import ArtifactError, ModelSpecError, RewriteError, explain

DATA_FACTORIES = ("batches", "make_batches", "data", "loader")
FILE_NAME = "diagnosis.json"
_PICKLED = (".pt", ".pth", ".bin")

Data = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py[:factory]",
        help="What returns the batches, or (batches, loss_fn). Default: the inputs MODEL was captured on, once.",
    ),
]
Batches = Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after so many. Default: all of the data.")]
BaselinePath = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="A twin that was trained without the rewrite, to stand beside it: a .safetensors file, a .pt state dict, "
        "or a MODEL. Default: the original network with the parameters of MODEL.",
    ),
]
NoPlots = Annotated[bool, typer.Option("--no-plots", help="Write no plots; matplotlib is not needed.")]
Folder = Annotated[
    Path | None, typer.Option("-o", metavar="FOLDER", help="Folder to write to. Default: <name>.diagnosis, here.")
]
ForceFolder = Annotated[bool, typer.Option("--force", help="Replace a diagnosis that is there already.")]


@dataclass(frozen=True, slots=True)
class _Data:
    batches: Iterable[Any]
    loss_fn: Callable[[Any, Any], Any] | None = None


EXAMPLES = (
    "diagnose gpt.attnres --data my_data.py:validation --batches 50",
    "diagnose gpt.attnres --data my_data.py --baseline twin.safetensors -o figures",
    "diagnose examples/gpt.py --blocks 4 --no-plots --json",
)


@options.plans(without=("schedule",))
def diagnose(
    model: options.Model,
    config: "ar.AttnResConfig",
    data: Data = None,
    batches: Batches = None,
    baseline: BaselinePath = None,
    batch: options.Batch = None,
    seq: options.Seq = None,
    device: options.Device = None,
    no_plots: NoPlots = False,
    path: Folder = None,
    force: ForceFolder = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what MODEL learnt to read: depth-attention weights, magnitudes and gradients, beside the original network.

    MODEL runs in eval mode where it has one. Batches whose loss is not finite are counted and left out.

    Exit status: 0 done, 1 refused with a reason or nothing finite to show, 2 wrong arguments.
    """
    from attnres_rewrite import plots

    target = path or Path(f"{load.name_of(model)}.diagnosis")
    refuse_unwritable_folder(target, force)
    if not no_plots:
        plots.require_matplotlib()
    with render.working("load the data"):
        given = None if data is None else _load_data(data)
    found = options.load_model(model, config, False, batch, seq, device)
    with render.working("load the baseline"):
        twin = None if baseline is None else _load_twin(baseline)
    with render.working("capture") as stage:
        new = rewritten(found, config, stage, verify=False)
    if found.kind == "original":
        render.warning(f"{model} is no rewrite: it was rewritten here, unproven, and all its queries are zero")
    if True in new.programs and False not in new.programs:
        render.warning("the model was captured in train mode only, so its dropout is in the figures")
    else:
        new.eval()
    given = given or _example_data(new)
    place = next(new.parameters()).device
    with render.counting("batches") as count, _blaming_batch(data or model):
        diagnosis = ar.diagnose(
            new,
            _Blamed(given.batches, data or model, place),
            loss_fn=given.loss_fn,
            baseline=twin,
            max_batches=batches,
            progress=count,
        )
    _warn(diagnosis, batches)
    written = _write(diagnosis, target, force, not no_plots)
    _show(diagnosis, target, written, as_json)


def _show(diagnosis: "ar.Diagnosis", target: Path, written: list[Path], as_json: bool) -> None:
    if as_json and diagnosis.streams:
        render.facts(diagnosis.to_dict() | {"written": [str(file) for file in written]})
    elif diagnosis.streams:
        render.diagnosis(diagnosis)
        render.line("")
        render.line(f"written  {target}: {', '.join(file.name for file in written)}")
    else:
        why = f"All {diagnosis.num_batches} had a loss or a figure that is not finite; {written[0]} says so."
        raise RewriteError(explain("there is nothing to show: no batch was finite", None, why))


def _write(diagnosis: "ar.Diagnosis", target: Path, force: bool, with_plots: bool) -> list[Path]:
    """Write the record and its plots; plots of the diagnosis that is replaced would pass for those of this one."""
    from attnres_rewrite import plots

    target.mkdir(exist_ok=True)
    made = plots.plot_files(diagnosis, target) if with_plots else ()
    stale = [path for path in _plots_there(target, diagnosis) if path not in made]
    written = [diagnosis.save(target / FILE_NAME, force=force)]
    for path in stale:
        path.unlink()
    if stale:
        render.warning(f"removed {render._many(len(stale), 'plot')} of the diagnosis that was in {target}")
    if made:
        written += plots.save_plots(diagnosis, target, force=force)
    return written


def _plots_there(target: Path, diagnosis: "ar.Diagnosis") -> list[Path]:
    """Return the plots that a run wrote to `target` before: what bears such a name without a diagnosis is not ours."""
    from attnres_rewrite import plots

    if not (target / FILE_NAME).is_file():
        return []
    try:
        before = ar.Diagnosis.load(target / FILE_NAME)
    except ArtifactError:
        before = diagnosis  # damaged; names follow from those of the streams, as a rule the same
    files = {*plots.plot_files(before, target), *plots.plot_files(diagnosis, target)}
    return sorted(path for path in files if path.is_file())


def _load_data(spec: str) -> _Data:
    """Import the data file and call its factory.

    Raises:
        ModelSpecError: It gives no batches.
        ValueError: `spec` names no file.
    """
    from torch import Tensor

    location, name = load._split(spec)
    path = Path(location)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"--data {spec}: there is no file {path}; it is FILE.py[:factory]")
    module = load._import_file(path)
    names = DATA_FACTORIES if name is None else (name,)
    made: Any = next((getattr(module, found) for found in names if hasattr(module, found)), None)
    if made is None:
        defined = load._callables(module)
        remedy = f"Name one of them, as in {location}:{defined[0]}. {RETURNS}" if defined else RETURNS
        why = f"It defines {', '.join(defined) or 'no function and no class'}."
        raise ModelSpecError(explain(f"{location} has no {' or '.join(names)}", None, why, remedy))
    if callable(made):
        if required := load.required_arguments(made):
            why = f"The factory wants {', '.join(required)}, and is called without arguments."
            raise ModelSpecError(explain(f"{spec} gives no batches", None, why, RETURNS))
        with load._blaming(f"{spec} raised"):
            made = made()
    items = cast(tuple[Any, ...], made) if isinstance(made, tuple) else ()
    batches, loss_fn = items if len(items) == 2 and callable(items[1]) else (made, None)
    # a tensor and a mapping can be iterated, and are one batch
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor | Mapping | str):
        seen = f"It returned a {type(cast(object, batches)).__name__}."
        raise ModelSpecError(explain(f"{spec} gives no batches", None, seen, RETURNS))
    return _Data(cast(Iterable[Any], batches), None if loss_fn is None else _blamed(loss_fn, spec))


def _blamed(loss_fn: Callable[[Any, Any], Any], spec: str) -> Callable[[Any, Any], Any]:
    def loss(outputs: Any, batch: Any) -> Any:
        with load._blaming(f"the loss_fn of {spec} raised"):
            return loss_fn(outputs, batch)

    return loss


RETURNS = "A data factory takes no arguments and returns an iterable of batches, or (batches, loss_fn)."


def _example_data(new: "ar.RewrittenModule") -> _Data:
    render.warning("there is no --data: the figures are of the inputs the model was captured on, which are no data")
    inputs = new.example_inputs
    names = list(inspect.signature(new.forward).parameters)
    return _Data([dict(zip(names, inputs.args, strict=False)) | inputs.kwargs])


@dataclass(frozen=True, slots=True)
class _Blamed:
    """The batches of a user's code, moved to the model: what that code raises is a refusal that names it."""

    batches: Iterable[Any]
    spec: str
    device: Any  # a torch.device

    def __len__(self) -> int:
        """Return the number of batches; raise TypeError where there is none, as len() does."""
        return len(cast(Sized, self.batches))

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self.batches)
        while True:
            with load._blaming(f"the batches of {self.spec} raised"):
                try:
                    held = [moved(next(iterator), self.device)]
                except StopIteration:
                    return
            yield held.pop()  # nothing here holds a batch while it is used


@contextmanager
def _blaming_batch(spec: str) -> Generator[None]:
    """Turn what torch raises while a batch is run into a refusal that says which batch, and what is in it."""
    try:
        yield
    except Exception as why:
        notes: list[str] = getattr(why, "__notes__", [])
        if exit_code_of(why) is not None or not notes:
            raise
        raise ModelSpecError(
            explain(f"{spec} has a batch that cannot be run", None, load._brief(why), notes[-1])
        ) from why


def _load_twin(path: str) -> Any:
    """Read the values of a twin: a state dict, or the module that a MODEL gives."""
    import safetensors
    import safetensors.torch
    import torch

    file = Path(path)
    if not file.exists() and file.suffix in (".safetensors", *_PICKLED):
        raise ValueError(f"--baseline {path}: there is no file {file}")
    if not file.is_file() or file.suffix not in (".safetensors", *_PICKLED):
        return _twin_of_spec(path)
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        values = torch.load(file, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, RuntimeError, ValueError, EOFError, OSError, UnpicklingError) as why:
        raise ModelSpecError(
            explain(f"--baseline {path} cannot be read", None, f"{type(why).__name__}: {why}")
        ) from why
    # None would be the network's own parameters
    if not isinstance(values, Mapping):
        seen = f"It holds a {type(values).__name__}."
        raise ModelSpecError(
            explain(f"--baseline {path} is no state dict", None, seen, "torch.save(twin.state_dict())")
        )
    return cast(Mapping[str, Any], values)


def _twin_of_spec(spec: str) -> Any:
    """Return the module that a MODEL gives, and say what its loader noted, such as weights that are random."""
    found = load.load(spec)
    # without its queries it would pass for a network that never had any
    if found.kind == "trained":
        why = "A twin was trained without them."
        raise ModelSpecError(explain(f"--baseline {spec} was trained with Attention Residuals", None, why))
    for note in found.notes:
        render.warning(f"--baseline: {note}")
    return found.model


def _warn(diagnosis: "ar.Diagnosis", wanted: int | None) -> None:
    if wanted is not None and diagnosis.num_batches < wanted:
        has = render._many(diagnosis.num_batches, "batch", "batches")
        render.warning(f"the data has {has}, fewer than --batches {wanted}")
    if diagnosis.num_nonfinite:
        which = ", ".join(map(str, diagnosis.nonfinite_batches))
        more = ", ..." if len(diagnosis.nonfinite_batches) < diagnosis.num_nonfinite else ""
        render.warning(
            f"{diagnosis.num_nonfinite} of {diagnosis.num_batches} batches were not finite and are in no figure: "
            f"batch {which}{more}"
        )
