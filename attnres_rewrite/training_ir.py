"""A graph that Dynamo traced -> ATen training IR for the passes, and back.

Dynamo writes torch functions and tensor methods, and hands parameters over as inputs; the passes know ATen calls, and
parameters that are read by get_attr.

    forward(ids, weight):  F.linear(F.embedding(ids, table), weight)
    ->  program(ids):      aten.linear(aten.embedding(get_attr table, ids), get_attr weight)
    ->  forward(ids, weight) again, for AOTAutograd: inputs in Dynamo's order, with their sources

Traced before autograd and not functionalised, as torch.export's training IR is, so dropout and checkpoints stay. It is
traced at Dynamo's own fake inputs: dynamic sizes keep their symbols, and what torch asks about them becomes a guard.
"""

import itertools
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx, track_tensor_tree
from torch.fx.node import map_aggregate
from torch.utils.checkpoint import CheckpointPolicy

from attnres_rewrite.errors import CaptureError, explain
from attnres_rewrite.fxgraph import place_of
from attnres_rewrite.kernels.routes import compiling

# what later compilers read; the rest is made anew by them
_KEPT_META = frozenset(
    ["stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "custom", "recompute", "ac_graph_id"]
)
# of the activation checkpoints that were opened up: the partitioner keeps different ones apart
_checkpoints = itertools.count(1 << 20)
# the calls between which Dynamo writes what torch.vmap and torch.func.grad do
_BEGINS, _ENDS = "_increment_nesting", "_decrement_nesting"
_OF_MODULE = re.compile(r"(\._parameters\[|\._buffers\[)[^]]*\]$")


@dataclass(frozen=True, slots=True)
class TracedProgram:
    """A graph for the passes: `module` takes all inputs of Dynamo's graph, and reads some by get_attr instead.

    `inputs` are the placeholders of `module`, in Dynamo's order; `by_target` maps the target of a get_attr to the
    placeholder it stands for.
    """

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    by_target: Mapping[str, fx.Node]


def to_training_ir(gm: fx.GraphModule, names: Mapping[str, str]) -> TracedProgram:
    """Trace Dynamo's graph into ATen calls.

    Args:
        gm: A graph as a Dynamo backend gets it; it is not changed.
        names: For some placeholders of `gm`, by name, the target under which passes will ask for them. Parameters
            and buffers that it leaves out get a target of their own.
    """
    given = _placeholders(gm.graph)
    module = _traced(gm, [node.meta["example_value"] for node in given])
    inputs = tuple(_placeholders(module.graph))
    by_target: dict[str, fx.Node] = {}
    for number, (old, new) in enumerate(zip(given, inputs, strict=True)):
        target = names.get(old.name) or (f"input_{number}" if _belongs_to_module(old) else None)
        if target is None:
            continue
        by_target[target] = new
        _put(module, target, old.meta["example_value"])
        if new.users:
            with module.graph.inserting_after(inputs[-1]):
                read = module.graph.get_attr(target)
            read.meta = dict(new.meta)
            new.replace_all_uses_with(read)
    return TracedProgram(module, inputs, by_target)


def to_dynamo(traced: TracedProgram, gm: fx.GraphModule) -> None:
    """Give `gm` the graph of `traced`, as the passes left it, in place of its own.

    It is traced once more, so that calls of our functions become ATen calls and custom ops, which every cache of
    torch.compile knows how to compare.
    """
    for node in list(traced.module.graph.find_nodes(op="get_attr")):
        if str(node.target) in traced.by_target:
            node.replace_all_uses_with(traced.by_target[str(node.target)])
            traced.module.graph.erase_node(node)
    traced.module.recompile()
    given = _placeholders(gm.graph)
    with compiling():
        lowered = _traced(traced.module, [node.meta["example_value"] for node in given])
    _make_mixes_again(lowered.graph)
    for old, new in zip(given, _placeholders(lowered.graph), strict=True):
        new.meta = old.meta
        new.__dict__.update({key: value for key, value in old.__dict__.items() if key.startswith("_dynamo")})
    for node in lowered.graph.nodes:
        if node.op != "placeholder":
            node.meta = {key: value for key, value in node.meta.items() if key in _KEPT_META}
    _adopt_constants(gm, lowered)
    gm.graph = lowered.graph


def _make_mixes_again(graph: fx.Graph) -> None:
    """Have the kernels' phase-1 results made again for the backward, as kernels/inter_block/op.py does under Dynamo."""
    for mixes in graph.find_nodes(op="call_function", target=torch.ops.attnres.inter_block.default):
        number = next(_checkpoints)
        for node in _with_items(mixes):
            node.meta |= {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": number}


def _with_items(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node and what is taken out of the tuple it returns."""
    yield node
    for user in node.users:
        if user.target is operator.getitem:
            yield from _with_items(user)


def _traced(gm: fx.GraphModule, values: Sequence[Any]) -> fx.GraphModule:
    """Run `gm` on fake inputs and write down its ATen calls, with their values and where they come from."""
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    with ExitStack() as stack:
        if mode is not None:
            stack.enter_context(mode)
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env else nullcontext())
        stack.enter_context(traceback.preserve_node_meta())
        # an in-place op must not reach Dynamo's own fake tensors
        fresh = [value.detach().requires_grad_(value.requires_grad) if _is_data(value) else value for value in values]
        return make_fx(_Tracing(gm).run, pre_dispatch=True, _allow_non_fake_inputs=True)(*fresh)


class _Tracing(fx.Interpreter):
    """Runs a graph for make_fx; knows what make_fx does not.

    A torch.autograd.Function has a backward of its own: its call is kept whole. An activation checkpoint is opened up,
    because the stream runs through it, and its calls are tagged as AOTAutograd tags them. Calls under torch.vmap or
    torch.func.grad have values of another kind: they are copied as they are, and traced by AOTAutograd.
    """

    def __init__(self, module: fx.GraphModule, checkpoint: int | None = None) -> None:
        super().__init__(module)
        self.checkpoint = checkpoint
        self.transformed = frozenset(_transformed(module.graph))

    def run_node(self, n: fx.Node) -> Any:
        if self.checkpoint is not None and n.op in ("call_function", "call_method"):
            n.meta |= {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": self.checkpoint}
        if n in self.transformed:
            return self._written(n)
        if n.target is torch.ops.higher_order.autograd_function_apply:
            return self._kept(n)
        if n.target is torch.ops.higher_order.tag_activation_checkpoint:
            return self._opened(n)
        return super().run_node(n)

    def _opened(self, n: fx.Node) -> Any:
        (body, *args), _ = self.fetch_args_kwargs_from_env(n)
        assert isinstance(body, fx.GraphModule)
        if "_checkpoint_context_fn" in body.meta:
            raise CaptureError(
                explain(
                    "a selective activation checkpoint (context_fn) lies around the stream",
                    place_of(n),
                    "What it keeps is decided call by call, which a rewritten graph cannot follow.",
                    "Checkpoint without context_fn.",
                )
            )
        return _Tracing(body, next(_checkpoints)).run(*args)

    def _kept(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        for number, body in enumerate(value for value in args if isinstance(value, nn.Module)):
            _tracer().root.register_module(f"{n.name}_body_{number}", body)
        return self._written(n)

    def _written(self, n: fx.Node) -> Any:
        """Write a call down as it is; what it returns is known already."""
        tracer = _tracer()
        given = map_aggregate(self.fetch_args_kwargs_from_env(n), tracer.unwrap_proxy)
        with traceback.set_current_meta(n):
            proxy = tracer.create_proxy(n.op, n.target, *given)
        if n in self.transformed and all(user in self.transformed for user in n.users):
            return proxy
        result = n.meta["example_value"] if "example_value" in n.meta else n.meta["val"]
        return track_tensor_tree(result, proxy, constant=None, tracer=tracer)


def _tracer() -> Any:
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer


def _transformed(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes under torch.vmap or torch.func.grad, with the calls that begin and end them."""
    depth = 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        depth += name.endswith(_BEGINS)
        if depth:
            yield node
        depth -= name.endswith(_ENDS)


def _is_data(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
        return False
    # a tensor without dimensions may be a number that Dynamo wrapped: the fake one knows its symbol, a copy would not
    return value.is_leaf and value.dim() > 0


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="placeholder"))


def _belongs_to_module(placeholder: fx.Node) -> bool:
    """Say whether an input is a parameter or a buffer of some module; Dynamo calls it by its path."""
    if isinstance(placeholder.meta["example_value"], nn.Parameter):
        return True
    return bool(_OF_MODULE.search(dynamo_source(placeholder)))


def dynamo_source(placeholder: fx.Node) -> str:
    """Return the expression by which Dynamo found an input, "L['self']._modules['head']._parameters['weight']"."""
    name: Any = getattr(getattr(placeholder, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)


def _put(module: nn.Module, target: str, value: torch.Tensor) -> None:
    """Make `target` resolve, as Graph.lint wants it."""
    *path, name = target.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)


def _adopt_constants(gm: fx.GraphModule, lowered: fx.GraphModule) -> None:
    """Give `gm` what the lowered graph reads by get_attr, under names that are free."""
    for node in lowered.graph.find_nodes(op="get_attr"):
        value = getattr(lowered, str(node.target))
        if getattr(gm, str(node.target), value) is not value:
            node.target = f"{node.target}_lowered"
        setattr(gm, str(node.target), value)
