"""Run a captured graph in float64, whatever precision it was written for.

Parameters, buffers and inputs become float64; so do the casts that models write into their norms, and
tensors made with the default dtype. An op without a float64 kernel runs in float32, and is remembered.
"""

import copy
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from attnres_rewrite.fxgraph import op_name
from attnres_rewrite.module import attribute

_LOWER = frozenset({torch.float16, torch.bfloat16, torch.float32})
# an eps small enough to vanish in float64, and large enough that a zero vector stays finite
_NO_EPS = 1e-60
_LARGEST_EPS = 1e-3
_TRAINED_VARIANCE = 4.0
_NORMS_WITH_EPS = {"layer_norm": 4, "native_layer_norm": 4, "rms_norm": 3, "group_norm": 4}


# Random numbers are laid out as the input is: equal values in another order of memory would get another mask.
_FILLED_IN_MEMORY_ORDER = frozenset(
    f"aten::{name}"
    for name in "dropout native_dropout alpha_dropout feature_dropout bernoulli rand_like randn_like empty_like".split()
)


class LiftedState:
    """The float64 copies of what a graph reads: parameters shared by all runs, buffers fresh in each."""

    def __init__(self, tree: nn.Module, graphs: Sequence[fx.Graph], perturb_constants: bool = True) -> None:
        self._tree = tree
        self._bodies: dict[str, nn.Module] = {}
        self.parameters: dict[str, Tensor] = {}
        lifted: dict[int, Tensor] = {}
        targets = {node.target for graph in graphs for node in graph.nodes if node.op == "get_attr"}
        for target in sorted(map(str, targets)):
            value = attribute(tree, target)
            if isinstance(value, nn.Parameter) and value.dtype.is_floating_point:
                if id(value) not in lifted:
                    lifted[id(value)] = _lifted_parameter(value, len(lifted), perturb_constants)
                self.parameters[target] = lifted[id(value)]
            elif isinstance(value, fx.GraphModule):
                self._bodies[target] = _lifted_body(value)

    def leaves(self) -> list[Tensor]:
        """Return each parameter once, tied ones once, in a fixed order."""
        return list({id(value): value for value in self.parameters.values()}.values())

    def fetch(self, target: str, fresh: dict[int, Tensor]) -> Any:
        """Return what a get_attr node reads; `fresh` holds this run's copies of the buffers."""
        if target in self.parameters:
            return self.parameters[target]
        if target in self._bodies:
            return self._bodies[target]
        value = attribute(self._tree, target)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in fresh:
            fresh[id(value)] = _trained_variance(target, lift(value.detach().clone()))
        return fresh[id(value)]


def _trained_variance(target: str, value: Tensor) -> Tensor:
    """Replace the variance of a batch norm that never saw a batch, which normalises nothing.

    An untrained network in eval mode then grows from layer to layer until rounding errors do, too.
    """
    untrained = target.endswith("running_var") and bool((value == 1).all())
    return value * _TRAINED_VARIANCE if untrained else value


def _lifted_parameter(value: Tensor, index: int, perturb_constants: bool) -> Tensor:
    """Copy a parameter; give a constant one (a zero-initialised projection) values that can be seen."""
    copied = value.detach().to(torch.float64, copy=True)
    if perturb_constants and copied.numel() and bool((copied == copied.flatten()[0]).all()):
        noise = torch.Generator().manual_seed(index)
        copied += 0.1 * torch.randn(copied.shape, generator=noise, dtype=torch.float64, device="cpu").to(copied.device)
    return copied.requires_grad_()


def _lifted_body(body: fx.GraphModule) -> fx.GraphModule:
    """Copy the body of a higher-order op, with its dtypes lifted."""
    body = copy.deepcopy(body)
    for node in body.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(_lifted_constant, (node.args, dict(node.kwargs)))
    for name, value in list(body.named_buffers()) + list(body.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if isinstance(value, nn.Parameter):
            setattr(attribute(body, owner), leaf, nn.Parameter(lift(value.detach()), value.requires_grad))
        else:
            attribute(body, owner)._buffers[leaf] = lift(value)
    body.recompile()
    return body


def _lifted_constant(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOWER else value


def lift(value: Any) -> Any:
    """Return a float64 copy of a floating-point tensor, and anything else as it is."""
    return value.to(torch.float64) if isinstance(value, Tensor) and value.dtype in _LOWER else value


class LiftedInterpreter(fx.Interpreter):
    """Run one graph on a LiftedState.

    `float32_ops` names the ops that had no float64 kernel. With `without_eps` the eps of every norm vanishes, with
    `without_bias` the recency bias of every read.
    """

    def __init__(
        self, graph: fx.Graph, state: LiftedState, without_eps: bool = False, without_bias: bool = False
    ) -> None:
        super().__init__(nn.Module(), garbage_collect_values=True, graph=graph)
        self.state, self.without_eps, self.without_bias = state, without_eps, without_bias
        self.float32_ops: set[str] = set()
        self._fresh: dict[int, Tensor] = {}

    def run_lifted(self, leaves: Sequence[Any], seed: int = 0) -> tuple[list[Any], Any]:
        """Run on flat inputs; return the flat outputs and their structure. The random state is left as it was."""
        self._fresh = {}
        inputs = [lift(leaf.detach().clone()) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        with seeded((*inputs, *self.state.parameters.values()), seed), _float64_by_default():
            return pytree.tree_flatten(self.run(*inputs, enable_io_processing=False))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Read from the lifted state."""
        return self.state.fetch(target, self._fresh)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, its metadata checks left out: they name the dtypes of the capture."""
        return None if op_name(n) in ("_assert_tensor_metadata", "check_captured") else super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run an op with its dtype arguments lifted."""
        args, kwargs = pytree.tree_map(_lifted_constant, (tuple(args), dict(kwargs)))
        if self.without_eps:
            args, kwargs = _drop_eps(target, args, kwargs)
        if self.without_bias and "recency_bias" in kwargs:
            kwargs |= {"recency_bias": 0.0}
        if getattr(target, "_schema", None) is not None and target._schema.name in _FILLED_IN_MEMORY_ORDER:
            args = (args[0].contiguous(), *args[1:])
        try:
            return super().call_function(target, args, kwargs)
        except (RuntimeError, NotImplementedError) as why:
            if not isinstance(target, torch._ops.OpOverload) or not _lacks_float64(why):
                raise
            self.float32_ops.add(str(target))
            args, kwargs = pytree.tree_map(_lowered, (args, kwargs))
            return pytree.tree_map(lift, super().call_function(target, args, kwargs))


def _lacks_float64(why: Exception) -> bool:
    text = str(why)
    return any(word in text for word in ("Double", "double", "float64", "bf16", "bfloat16", "BFloat16"))


def _lowered(value: Any) -> Any:
    if value is torch.float64:
        return torch.float32
    return value.to(torch.float32) if isinstance(value, Tensor) and value.dtype is torch.float64 else value


def _drop_eps(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the eps of a norm, given as an argument or added to a mean square, by next to nothing."""
    name = getattr(getattr(target, "_schema", None), "name", "").removeprefix("aten::")
    position = _NORMS_WITH_EPS.get(name)
    if position is not None:
        if len(args) > position:
            args = (*args[:position], _NO_EPS, *args[position + 1 :])
        else:
            kwargs = kwargs | {"eps": _NO_EPS}
    elif "norm_eps" in kwargs:  # a norm that fuse_reads has put into a read
        kwargs = kwargs | {"norm_eps": _NO_EPS}
    elif name in ("add", "clamp_min", "clamp") and len(args) > 1:
        second = args[1]
        if isinstance(second, float) and 0 < second <= _LARGEST_EPS:
            args = (args[0], _NO_EPS, *args[2:])
    return args, kwargs


@contextmanager
def seeded(values: Iterable[Any], seed: int) -> Generator[None]:
    """Draw random numbers from a seed, on the CPU and on the GPUs that hold `values`; put every generator back after.

    torch.manual_seed would seed all GPUs of the machine.
    """
    devices = {value.device for value in values if isinstance(value, Tensor) and value.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


@contextmanager
def _float64_by_default() -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def override(state: LiftedState, values: Mapping[str, Tensor]) -> LiftedState:
    """Return a state that reads `values` for some parameters and shares the rest."""
    other = copy.copy(state)
    other.parameters = state.parameters | dict(values)
    return other
