"""Turn a model, however it is given, into graphs in ATen training IR.

nn.Module        torch.export in eval mode and in train mode; four ways, tried in a fixed order
ExportedProgram  its module(), in the one mode it was exported in
GraphModule      as it is when it holds ATen calls (torch.export), else exported like any module
                 (torch.fx.symbolic_trace, Dynamo)

Training IR keeps dropout, the very Parameter objects, their names and their ties; it is not
functionalised, because that would turn `dropout(train=False)` into a plain copy.

    model --export--> ep.module() --drop torch's guards, add check_inputs--> Captured
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnres_rewrite.copying import copy_graph
from attnres_rewrite.dynamo_graph import without_number_inputs
from attnres_rewrite.errors import AlreadyRewrittenError, CaptureError, explain
from attnres_rewrite.export_routes import Route, asks_for_fixed, automatic_dims, export, quiet, routes_for
from attnres_rewrite.fxgraph import argument, op_name, symbolic_shape_of, tensor_of
from attnres_rewrite.host_random import host_draws_refused
from attnres_rewrite.inputs import InputDims, check_inputs
from attnres_rewrite.model_caches import register_caches
from attnres_rewrite.model_state import drop_kept_tables, in_mode, plain_tensors_kept
from attnres_rewrite.module import adopt_tree, copy_tree, merge_trees, same_program
from attnres_rewrite.moving import read_device_names
from attnres_rewrite.records import Captured, FixedDim
from attnres_rewrite.trace_conditions import conditions_from, guards_of_module, input_paths

Progress = Callable[[str], None]


def capture(
    model: nn.Module | ExportedProgram | fx.GraphModule,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    both_modes: bool = True,
    progress: Progress | None = None,
) -> Captured:
    """Capture `model` on example inputs.

    Args:
        model: A module in any mode, an exported program, or a graph module from any tracer.
        args: Positional example inputs; tensors give shapes, dtypes and devices only.
        kwargs: Example inputs given by name.
        dynamic_shapes: As torch.export takes it. None keeps batch and sequence dynamic wherever the
            model allows: the first dimension of every tensor, the first two of [B, T] and [B, T, D]. {} fixes
            every shape, which halves the time.
        both_modes: Capture train mode and eval mode; False captures the model's own mode only. Where the other
            mode cannot be captured the reason is in `notes`.
        progress: Called with the name of each step.

    Raises:
        TypeError: `model` is none of the three.
        AlreadyRewrittenError: `model` is the result of a rewrite.
        GraphBreakError: Control flow depends on tensor values.
        CaptureError: No route worked; the message holds each route's reason.
    """
    start = time.perf_counter()
    say = progress or (lambda stage: None)
    # callers are not all type-checked
    if not isinstance(model, nn.Module | ExportedProgram):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model is a {type(model).__name__}; give an nn.Module, ExportedProgram or GraphModule")
    refuse_rewritten(model)
    _refuse_inference_mode()
    if isinstance(model, nn.Module):
        _refuse_distributed(model)
    if isinstance(model, ExportedProgram):
        say("capture (exported program)")
        return _from_program(model, "torch.export.ExportedProgram", start)
    if isinstance(model, fx.GraphModule) and _is_aten(model):
        say("capture (graph module)")
        return _from_graph_module(model, start)
    captured = _from_module(model, tuple(args), dict(kwargs or {}), dynamic_shapes, both_modes, say, start)
    return replace(captured, fixed_dims=()) if asks_for_fixed(dynamic_shapes) else captured


def _from_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    both_modes: bool,
    say: Progress,
    start: float,
) -> Captured:
    """Export a module in its own mode, and in the other one where that can be done."""
    if isinstance(model, fx.GraphModule):
        model = without_number_inputs(model, args)
    register_caches(model)
    drop_kept_tables(model)
    _refuse_other_device(model, (args, kwargs))
    args, kwargs = _told_apart((args, kwargs))
    programs: dict[bool, fx.GraphModule] = {}
    route: Route | None = None
    notes: list[str] = []
    for mode in [model.training, not model.training] if both_modes else [model.training]:
        say(f"capture ({'train' if mode else 'eval'})")
        routes = routes_for(dynamic_shapes) if route is None else (route,)
        try:
            with in_mode(model, mode), plain_tensors_kept(model), host_draws_refused(type(model).__name__):
                program, route = export(model, args, kwargs, dynamic_shapes, routes)
        except CaptureError as why:
            if mode == model.training:
                raise
            notes.append(f"{'train' if mode else 'eval'} mode was not captured: {why}")
        else:
            programs[mode] = _normalised(program)
    if len(programs) == 2 and same_program(*programs.values()):
        programs[not model.training] = programs[model.training]
    return replace(_captured(programs, model.training, str(route), start), notes=tuple(notes))


def _told_apart(inputs: Any) -> Any:
    """Copy a tensor that is given a second time: torch.export would make one input of both, whatever they are later."""
    seen: set[int] = set()

    def apart(leaf: torch.Tensor) -> torch.Tensor:
        if id(leaf) in seen:
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)
        seen.add(id(leaf))
        return leaf

    return pytree.tree_map_only(torch.Tensor, apart, inputs)


def refuse_rewritten(model: object) -> None:
    """Raise AlreadyRewrittenError when `model` holds the parameters of an earlier rewrite."""
    if not isinstance(model, nn.Module):
        return
    for name, _ in model.named_parameters():
        path = name.split(".")
        if len(path) >= 3 and path[-3] == "attn_res" and path[-2].isdigit() and path[-1] == "query":
            raise AlreadyRewrittenError(
                explain(
                    "the model was rewritten already",
                    name,
                    "Its reads mix the depth now, so it has no plain residual stream left.",
                    "Use the original model, or detach() this one; as_rewritten() is the rewrite of an attached one.",
                )
            )


def _refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise CaptureError(
            explain(
                "torch.inference_mode() is on, and what is made under it cannot be trained",
                None,
                "The parameters of the reads would be inference tensors.",
                "Call this outside of it; torch.no_grad() does no harm.",
            )
        )


def _refuse_distributed(model: nn.Module) -> None:
    """Raise CaptureError for what works with other processes or devices as it is called."""
    for name, part in model.named_modules():
        if isinstance(part, nn.parallel.DistributedDataParallel | nn.DataParallel):
            kind = type(part).__name__
            raise CaptureError(
                explain(
                    f"{kind} is around the model, and what it does between processes or devices is no part of a graph",
                    name or None,
                    "",
                    f"Give the model in it, its .module, and put {kind} around the result.",
                )
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            raise CaptureError(
                explain(
                    "the parameters are sharded (DTensor), and a graph is captured from whole ones",
                    name,
                    "",
                    "Give the whole model; unflatten() makes layers of the result, which fully_shard takes.",
                )
            )


def _refuse_other_device(model: nn.Module, inputs: Any) -> None:
    """Raise CaptureError when no input is on the one device that holds the model."""
    owned = {parameter.device.type for parameter in model.parameters()}
    given = {leaf.device.type for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)}
    if len(owned) == 1 and given and not owned & given:
        raise CaptureError(
            explain(
                f"{type(model).__name__} is on {owned.pop()}, its example inputs are on {given.pop()}",
                None,
                "A graph is captured on the device where it will run.",
                "First check that model(*args, **kwargs) runs; move the inputs with .to(device).",
            )
        )


def _from_program(program: ExportedProgram, route: str, start: float) -> Captured:
    gm = _normalised(program)
    return _of_one_graph(gm, gm.training, route, start)


def _from_graph_module(model: fx.GraphModule, start: float) -> Captured:
    gm = _copy_graph_module(model)
    guards_fn = getattr(model, "_guards_fn", None)
    guards = [] if guards_fn is None else guards_of_module(guards_fn)
    _drop_torch_guards(gm)
    _add_input_check(gm, guards)
    return _of_one_graph(gm, model.training, "torch.fx.GraphModule of ATen calls", start)


def _of_one_graph(gm: fx.GraphModule, training: bool, route: str, start: float) -> Captured:
    """Say which mode a finished graph is of: the one its dropouts and batch norms show, or both without any."""
    modes = {mode for node in gm.graph.nodes if (mode := _mode_of(node)) is not None}
    if not modes:
        return _captured({True: gm, False: gm}, training, route, start)
    mode = True in modes
    gm.training = mode
    return _captured({mode: gm}, mode, route, start)


def _mode_of(node: fx.Node) -> bool | None:
    if op_name(node) in _MASKS or (op_name(node) == "scaled_dot_product_attention" and argument(node, 4, "dropout_p")):
        return True
    position, name = _MODE_ARGUMENTS.get(op_name(node), (0, ""))
    return bool(argument(node, position, name)) if name else None


# random masks: stochastic depth draws them in train mode only
_MASKS = frozenset("bernoulli bernoulli_ rand rand_like".split())
# where an op says whether it is training
_MODE_ARGUMENTS = {
    "dropout": (2, "train"),
    "native_dropout": (2, "train"),
    "alpha_dropout": (2, "train"),
    "feature_dropout": (2, "train"),
    "batch_norm": (5, "training"),
}


def _copy_graph_module(model: fx.GraphModule) -> fx.GraphModule:
    """Copy the graph; share every parameter, buffer, submodule and constant."""
    copy = fx.GraphModule(nn.Module(), fx.Graph())
    adopt_tree(copy, copy_tree(model))
    copy.training = model.training
    copy.graph, _ = copy_graph(model.graph)
    return copy


def _is_aten(model: fx.GraphModule) -> bool:
    """Say whether the graph is training IR already: ATen overloads whose values are known."""
    calls = [node for node in model.graph.nodes if node.op == "call_function"]
    if not calls or any(node.op == "call_method" for node in model.graph.nodes):
        return False
    overloads = [node for node in calls if isinstance(node.target, torch._ops.OpOverload)]
    return bool(overloads) and all("val" in node.meta for node in overloads)


def _normalised(program: ExportedProgram) -> fx.GraphModule:
    with quiet():
        gm = program.module()
    assert isinstance(gm, fx.GraphModule)
    read_device_names(gm)
    _drop_torch_guards(gm)
    _add_input_check(gm, program._guards_code)
    return gm


def _drop_torch_guards(gm: fx.GraphModule) -> None:
    """Remove torch.export's generated guard module and its hooks: check_inputs takes their place."""
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            gm.graph.erase_node(node)
    gm._modules.pop("_guards_fn", None)
    gm._forward_pre_hooks.clear()
    gm._forward_pre_hooks_with_kwargs.clear()
    gm.__dict__.pop("train", None)  # export replaces both by a function that raises
    gm.__dict__.pop("eval", None)


def _add_input_check(gm: fx.GraphModule, guards: Sequence[str] = ()) -> None:
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if any(node.target is check_inputs for node in gm.graph.nodes):
        return
    tensors = [node for node in placeholders if tensor_of(node) is not None]
    constants = [node for node in placeholders if "val" in node.meta and isinstance(node.meta["val"], _CONSTANTS)]
    if not tensors and not constants:
        return
    kwargs: dict[str, Any] = {}
    if constants:
        kwargs["constants"] = tuple((str(node.target), node.meta["val"]) for node in constants)
        kwargs["given"] = tuple(constants)
    if guards:
        info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
        paths = input_paths([name for name in info.orig_args if name != "self"], info.in_spec)
        conditions = conditions_from(guards, paths, [placeholders.index(node) for node in tensors])
        if conditions:
            kwargs["conditions"] = conditions
    with gm.graph.inserting_after(placeholders[-1]):
        gm.graph.call_function(check_inputs, (tuple(input_dims(node) for node in tensors), *tensors), kwargs)


# symbolic numbers are none of these
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


def input_dims(placeholder: fx.Node) -> InputDims:
    """Return the dimensions that an input must have: a size, or a symbol shared by equal sizes."""
    shape = symbolic_shape_of(placeholder)
    assert shape is not None
    return (str(placeholder.target), shape)


def _captured(programs: dict[bool, fx.GraphModule], training: bool, route: str, start: float) -> Captured:
    merge_trees(programs)
    fixed = {fact: None for gm in programs.values() for fact in _fixed_dims(gm)}
    seconds = time.perf_counter() - start
    return Captured(programs, training, route, tuple(fixed), seconds)


def _fixed_dims(gm: fx.GraphModule) -> Iterator[FixedDim]:
    """Yield the batch and sequence dimensions that the program takes in one size only."""
    for node in gm.graph.nodes:
        shape = symbolic_shape_of(node) if node.op == "placeholder" else None
        for dim, size in enumerate(shape or ()):
            if isinstance(size, int) and dim in (automatic_dims(tensor_of(node)) or {}):
                yield FixedDim(str(node.target), dim, size)
