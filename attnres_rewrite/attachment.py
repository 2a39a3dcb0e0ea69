"""attach(): give a model its queries and gains, and keep it the object it was.

    attach(model, config)       model.layers.3.attn_res.1.query is a parameter of the model now
    model.compile(backend="attnres")

For code that holds on to the model: Trainer, generate(), optimizers, DistributedDataParallel, PEFT. Its class becomes
a subclass of itself, of the same name, whose forward leaves a mark in what Dynamo traces (mark.py); the backend
(backend.py) replaces the stream there. Uncompiled, that forward raises.
"""

import functools
import inspect
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any, NoReturn

import torch
from torch import nn

from attnres_rewrite.api import plan_program, report_plans
from attnres_rewrite.attached_parts import count_original, guard_parts, guarded_parts, leave_original, release_parts
from attnres_rewrite.capture import capture, refuse_rewritten
from attnres_rewrite.carried_config import config_for, folder_with_queries, forget_config, note_config
from attnres_rewrite.config import AttnResConfig, check_config
from attnres_rewrite.dynamo_skips import active_callback, trace_again
from attnres_rewrite.errors import NotAttachedError, NotCompiledError, explain
from attnres_rewrite.example_inputs import example_inputs, is_huggingface
from attnres_rewrite.inputs import check_inputs_given
from attnres_rewrite.kernels.routes import is_exporting
from attnres_rewrite.mark import AttachedRead, AttachedStream, Attachment, mark_inputs
from attnres_rewrite.passes.insert_reads import add_parameters, refuse_taken_names
from attnres_rewrite.read_parameters import attnres_parameters
from attnres_rewrite.records import BlockPlan
from attnres_rewrite.report import RewriteReport
from attnres_rewrite.saved_reads import load_saved_reads

BATCH, SEQ = 2, 16


class Attached:
    """Mixed into the class of a model by attach(); kept apart so that nn.Module stays the first of its bases."""

    _attnres_facts: str | None = None  # the Attachment, as JSON; None for an object made anew, as type(model)(...) does
    _attnres_names: tuple[str, ...]  # of the queries and gains, in the order of the mark
    _attnres_original: bool  # inside `original(model)`
    _attnres_base: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the class the model had: the one it has now is made at run time."""
        return _rebuilt, (self._attnres_base,), self.__getstate__()  # type: ignore[attr-defined]

    def __setstate__(self, state: Any) -> None:
        """Take what was pickled or copied; a copy made inside `original` is not inside of it."""
        super().__setstate__(state)  # type: ignore[misc]
        leave_original(self)


def attach(
    model: nn.Module,
    config: AttnResConfig | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> RewriteReport:
    """Find the residual stream of `model` and add the queries and gains of its reads to it, as parameters.

    The model stays the object it is, with every parameter it had. From now on it has to be compiled with
    backend="attnres", which replaces the stream; called without, it raises. Queries start at zero: the compiled model
    computes what the model did.

    Args:
        model: Any module that `rewrite` takes. It is changed.
        config: As for `rewrite`; None takes the one that a transformers config carries from an earlier attach(), else
            the defaults. Where the folder that a transformers model came from has queries of a checkpoint with its
            weights, they are loaded. The model gets a config object of its own, which carries this one.
        args: Positional example inputs, on the model's device. A transformers model needs none.
        kwargs: Example inputs given by name.

    Returns:
        What was found and planned. The parameters have the names that `rewrite` gives them.

    Raises:
        AlreadyRewrittenError: `model`, or a part of it, is attached or rewritten, or has something named attn_res.
        ArtifactError: The folder the model came from has queries of other reads, or nothing says of which blocks.
        RewriteError: A refusal, as of `rewrite`.
        ValueError: No example inputs, or `config` contradicts the model's own config.
        TypeError: `model` is not a module that can be changed, or an argument is of another kind.
    """
    _check_model(model)
    check_inputs_given(args, kwargs)
    if config is not None:
        check_config(config)
    refuse_rewritten(model)
    folder = folder_with_queries(model)
    config = config_for(model, config, folder)
    captured = capture(model, args, inputs_for(model, args, kwargs, "attach"), {}, both_modes=False)
    planned = plan_program(captured.programs[captured.training], config)
    report = report_plans(model, config, captured, planned)
    attachment = Attachment(config, tuple(_attached_stream(model, plan) for plan in planned.plans))
    refuse_taken_names(model, planned.plans)
    try:
        add_parameters(model, planned.plans, config)
        _become(model, attachment)
        guard_parts(model, attachment)
        if folder is not None:
            load_saved_reads(model, folder)
    except BaseException:
        _take_off(model, attachment)
        raise
    note_config(model, config)
    _register_backend()
    return report


def detach(model: nn.Module) -> None:
    """Take off what attach() added: the queries and gains are gone, and the model is of its own class again.

    It is uncompiled, too, if it was compiled by `model.compile`.

    Args:
        model: An attached model, or a module that holds one.

    Raises:
        NotAttachedError: There is nothing to take off.
    """
    parts = list(attached_parts(model))
    for part in parts:
        _refuse_changed_class(part)
    for part in parts:
        _take_off(part, Attachment.from_json(part._attnres_facts))
        # of model.compile(backend="attnres"), which would refuse the model from now on
        part._compiled_call_impl = None
        forget_config(part)


def _take_off(model: Any, attachment: Attachment) -> None:
    """Undo what attach() did so far."""
    release_parts(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in attachment.parameter_names:
        owner = modules.get(name.rpartition("attn_res.")[0].rstrip("."))
        # a layer that was taken out since took its reads with it
        if owner is not None:
            owner._modules.pop("attn_res", None)
    for field in ("_attnres_facts", "_attnres_names", "_attnres_original"):
        model.__dict__.pop(field, None)
    if hasattr(model, "_attnres_base"):
        model.__class__ = model._attnres_base


def _refuse_changed_class(part: Attached) -> None:
    if "_attnres_base" not in type(part).__dict__:
        raise TypeError(
            f"the class of this {part._attnres_base.__name__} was changed after attach(), to {type(part).__name__}, so "
            "detach() cannot give it back: undo that first, for a parametrization with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )


@contextmanager
def original(model: nn.Module) -> Generator[None]:
    """Run an attached model as the network it was, without its reads, compiled or not, for the length of a `with`.

    It is the model that is switched, so every thread that calls it meanwhile runs the original; where several threads
    ask for that, until the last of them is done.

    Args:
        model: An attached model, or a module that holds one; the one inside is what is run.

    Raises:
        NotAttachedError: No part of `model` is attached.
    """
    # once: what is entered is left, whatever happens to the model meanwhile
    modules = [module for each in attached_parts(model) for module in (each, *guarded_parts(each))]
    try:
        for module in modules:
            count_original(module, 1)
        yield
    finally:
        for module in modules:
            count_original(module, -1)


def _check_model(model: nn.Module) -> None:
    # callers are not all type-checked
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"attach() changes an nn.Module; this is a {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError("attach() comes before torch.compile: attach the module itself, then compile it")
    if isinstance(model, torch.fx.GraphModule):
        raise TypeError("a GraphModule has no code of its own to compile later; rewrite() takes it")
    if "forward" in model.__dict__:
        raise TypeError(
            f"the forward of this {type(model).__name__} was replaced on the object, so attach() cannot wrap it: "
            "attach first, then let the other library do so"
        )


def inputs_for(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, caller: str) -> dict[str, Any]:
    """Return the inputs by name to capture `model` with; without any, those that a transformers model takes.

    Raises:
        ValueError: There are none, and it is no transformers model.
    """
    if args or kwargs is not None:
        return dict(kwargs or {})
    if is_huggingface(model):
        # a stream is the same with a cache, and torch.export does not know every kind of cache
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        return example_inputs(model, BATCH, SEQ) | ({"use_cache": False} if takes_cache else {})
    raise ValueError(
        f"{caller}() captures {type(model).__name__} to find its stream: give example inputs, "
        f"{caller}(model, args=(ids,))"
    )


def _attached_stream(model: nn.Module, plan: BlockPlan) -> AttachedStream:
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {module: [name for name, other in modules.items() if other is module] for module in modules.values()}
    reads = tuple(AttachedRead(read.state, read.name, tuple(names[modules[read.owner]])) for read in plan.reads)
    return AttachedStream(plan.stream.name, plan.stream.width, len(plan.stream.updates), plan.ends, reads)


def _become(model: nn.Module, attachment: Attachment) -> None:
    model._attnres_facts = attachment.to_json()  # type: ignore[assignment]
    model._attnres_names = attachment.parameter_names  # type: ignore[assignment]
    model._attnres_original = False  # type: ignore[assignment]
    model.__class__ = _attached_class(getattr(type(model), "_attnres_base", type(model)))


@functools.cache
def _attached_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `base` whose forward leaves the mark; it goes by the same name."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # after detach() whoever kept this function, as accelerate does, has that of the model
        if getattr(self, "_attnres_facts", None) is not None and not self._attnres_original:
            if not torch.compiler.is_dynamo_compiling() and callable(active_callback()):
                _raise_what_stopped_dynamo(self, forward.__code__, args, kwargs)  # pyright: ignore[reportCallIssue]
            args, kwargs = _marked(self, args, kwargs)
        if not isinstance(self, attached):
            return base.forward(self, *args, **kwargs)
        # Dynamo does not see into a class that allow_in_graph marks, as some of diffusers are, but finds its methods
        return super(attached, self).forward(*args, **kwargs)

    # torch counts recompilations by code object, and this one would be that of every class
    forward.__code__ = forward.__code__.replace(co_name=f"attached_{base.__name__}")
    functools.update_wrapper(forward, base.forward)
    # who follows __wrapped__, as accelerate does to unwrap a model, would find a forward without the mark
    forward.__dict__.pop("__wrapped__")
    forward.__dict__["__signature__"] = inspect.signature(base.forward)
    described = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    own = {"forward": forward, "_attnres_base": base}
    attached = type(base.__name__, (Attached, base), described | own)
    return attached


@torch.compiler.disable
def _raise_what_stopped_dynamo(model: Any, code: CodeType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    """Raise the model's own error, by running it as it was: Dynamo met it, kept it, and skips the code."""
    trace_again(code)
    for name in model._attnres_names:
        parameter_of(model, name)
    with original(model):
        model._attnres_base.forward(model, *args, **kwargs)
    raise NotCompiledError(
        explain(
            f"torch.compile gave up this {model._attnres_base.__name__}, and would run it without its reads",
            None,
            "The model raises no error of its own in this call.",
            "TORCH_LOGS=graph_breaks in the environment makes torch say why.",
        )
    )


def _marked(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if is_exporting():
        raise NotCompiledError(
            "an attached model is not exported: its forward is still the original's\n"
            "  export attnres_rewrite.as_rewritten(model, args), which has its parameters; see Serving in docs/ways.md"
        )
    parameters = [parameter_of(model, name) for name in model._attnres_names]
    if any(isinstance(parameter, torch.fx.Proxy) for parameter in parameters):
        raise NotCompiledError(
            "torch.fx.symbolic_trace of an attached model would give the original's graph\n"
            "  detach() it first; rewrite() takes the graph, and gives one with reads"
        )
    if any(hasattr(parameter, "placements") for parameter in parameters):
        raise NotCompiledError(
            "the parameters of an attached model are sharded (DTensor), which the backend cannot put into one graph\n"
            "  replicate them: DistributedDataParallel works"
        )
    return mark_inputs(parameters, model._attnres_facts, args, kwargs)


def parameter_of(model: nn.Module, name: str) -> torch.Tensor:
    """Return a query or gain; torch.func.functional_call puts plain tensors in their places.

    Raises:
        NotAttachedError: It is gone.
    """
    module, _, kind = name.rpartition(".")
    try:
        return getattr(model.get_submodule(module), kind)
    except AttributeError:
        # raised below: in an except it gets a context, which Dynamo of torch 2.11 cannot trace
        pass
    raise NotAttachedError(f"the model lost {name}; detach() and attach() make it anew, with zero queries")


def _rebuilt(base: type[nn.Module]) -> nn.Module:
    cls = _attached_class(base)
    return cls.__new__(cls)


def attached_parts(model: nn.Module) -> Iterator[Any]:
    """Yield the attached modules in `model`, itself among them.

    Raises:
        NotAttachedError: There is none.
    """
    found = [part for part in model.modules() if isinstance(part, Attached) and part._attnres_facts is not None]
    if not found:
        raise _not_attached(model)
    yield from found


def _not_attached(model: nn.Module) -> NotAttachedError:
    try:
        attnres_parameters(model)
    except NotAttachedError as error:
        return error
    return NotAttachedError(
        explain(
            f"{type(model).__name__} has reads, and attach() did not add them",
            remedy="What rewrite() returns has no other form; the model it was given is as it was.",
        )
    )


def _register_backend() -> None:
    """Make backend="attnres" known where the package was not installed, and so has no entry point."""
    from torch._dynamo.exc import InvalidBackend

    from attnres_rewrite.backend import attnres

    try:
        torch._dynamo.lookup_backend("attnres")
    except InvalidBackend:
        torch._dynamo.register_backend(attnres, name="attnres")
