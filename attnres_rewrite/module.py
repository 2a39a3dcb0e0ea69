"""RewrittenModule: the result of a rewrite, a ModalModule: one fx.GraphModule with a graph for each mode.

`.train()` and `.eval()` switch the graph, as dropout and stochastic depth are part of a captured graph. Both
graphs read one tree of parameters. Their forwards are generated once, so that torch.compile sees two
functions and keeps a compilation of each. `.to(device)` brings along what the graphs make themselves.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.copying import copy_graph, map_plan
from attnres_rewrite.inductor_fix import mend_inductor
from attnres_rewrite.moving import move_attributes, move_graph, ties_kept
from attnres_rewrite.records import BlockPlan
from attnres_rewrite.report import RewriteReport

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@dataclass(frozen=True, slots=True)
class Program:
    """One mode of a rewritten model: the graph that runs, and what it must be equal to.

    `plans` refers to nodes of `original`, which holds the model as it was captured.
    """

    graph: fx.Graph
    original: fx.Graph
    plans: tuple[BlockPlan, ...]


@dataclass(frozen=True, slots=True)
class ExampleInputs:
    """The inputs a model was captured on; proofs run on them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, device: torch.device) -> "ExampleInputs":
        """Return them on a device; they keep their numbers, for when the model comes back from meta."""

        def moved(value: Any) -> Any:
            has_numbers = isinstance(value, torch.Tensor) and not value.is_meta
            return value.to(device) if has_numbers and device.type != "meta" else value

        return ExampleInputs(*pytree.tree_map(moved, (self.args, self.kwargs)))


class ModalModule(fx.GraphModule):
    """A GraphModule with a graph for each mode, all on one tree of parameters; its class name is given.

    Attributes:
        graphs: By training flag.
    """

    graphs: dict[bool, fx.Graph]

    def __init__(self, tree: nn.Module, graphs: Mapping[bool, fx.Graph], training: bool, class_name: str) -> None:
        """Share the parameters, buffers and submodules of `tree`."""
        super().__init__(nn.Module(), fx.Graph(), class_name=class_name)
        adopt_tree(self, tree)
        self.graphs = dict(graphs)
        for module in self.modules():
            module.training = training
        self._device = self._device_of_parameters()
        self._class = type(self)
        self._generate()

    def _generate(self) -> None:
        """Make the forward of each graph, and use that of the present mode."""
        self._forwards: dict[bool, dict[str, Any]] = {}
        # fully_shard gives a module another class, in which what fx generates would call itself
        wrapped, self.__class__ = self.__class__, self._class
        try:
            for mode, graph in self.graphs.items():
                twin = not mode
                if twin in self._forwards and self.graphs[twin] is graph:
                    self._forwards[mode] = self._forwards[twin]
                    continue
                self.graph = graph
                give_constants_as_defaults(type(self).forward, graph)
                kept = {name: value for name, value in self.__dict__.items() if name in _GENERATED}
                self._forwards[mode] = kept | {"forward": type(self).forward}
        finally:
            self.__class__ = wrapped
        self._use(self.training)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Do what `to`, `cuda`, `cpu` and `to_empty` do, for the graphs as well; what was tied stays tied."""
        with ties_kept(self):
            super()._apply(fn, recurse)
        device = self._device_of_parameters()
        if device is not None and device != self._device:
            self._move_graphs(device)
            self._device = device
        return self

    def _device_of_parameters(self) -> torch.device | None:
        """Return the device of all parameters, or None where they have several."""
        devices = {parameter.device for parameter in self.parameters()}
        return devices.pop() if len(devices) == 1 else None

    def _move_graphs(self, device: torch.device) -> None:
        moved = {id(graph): _moved(graph, device)[0] for graph in self.graphs.values()}
        self.graphs = {mode: moved[id(graph)] for mode, graph in self.graphs.items()}
        move_attributes(self, self.graphs.values(), device)
        self._generate()

    def train(self, mode: bool = True) -> Self:
        """Switch to the graph captured in this mode.

        Raises:
            NotImplementedError: The model came as a graph of the other mode only.
        """
        if mode not in self.graphs:
            name, other = ("train", "eval") if mode else ("eval", "train")
            raise NotImplementedError(f"this model was captured in {other} mode only. {self._why_one_mode(name)}")
        super().train(mode)
        self._use(mode)
        return self

    def _why_one_mode(self, missing: str) -> str:
        return f"An exported graph holds one mode; rewrite the nn.Module itself to have {missing} mode too."

    def _use(self, mode: bool) -> None:
        chosen = dict(self._forwards[mode])
        type(self).forward = chosen.pop("forward")
        self.__dict__.update(chosen)

    def _on(self, tree: nn.Module) -> "ModalModule":
        """Return the same on other parameters."""
        return ModalModule(tree, self.graphs, self.training, self._get_name())

    def __copy__(self) -> "ModalModule":
        # fx would copy the graph of one mode only
        return self._on(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModalModule":
        tree = nn.Module()
        for name in _TABLES:
            tree.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        for name, value in constants_of(self).items():
            tree.__dict__[name] = copy.deepcopy(value, memo)
        new = self._on(tree)
        memo[id(self)] = new
        return new

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a {self._get_name()} is not pickled; keep its state_dict(), or use attnres_rewrite.save(new, folder) and "
            "load(folder) on what rewrite() returned"
        )


class RewrittenModule(ModalModule):
    """A model whose residual stream is mixed by Attention Residuals.

    It is called as the original was, returns what the original returned, and has every key of its state
    dict, plus a query and a gain [D] for each read.

    Attributes:
        report: What was found, planned and proved.
        config: The choices it was made with.
        programs: The graphs of each mode, by its training flag.
        example_inputs: What it was captured on.
    """

    report: RewriteReport
    config: AttnResConfig
    programs: dict[bool, Program]
    example_inputs: ExampleInputs

    def __init__(
        self,
        tree: nn.Module,
        programs: Mapping[bool, Program],
        training: bool,
        config: AttnResConfig,
        report: RewriteReport,
        example_inputs: ExampleInputs,
    ) -> None:
        """Share the parameters, buffers and submodules of `tree`; `programs` maps a training flag to its program."""
        mend_inductor()  # whoever compiles this uses torch.compile, where nothing of ours runs
        graphs = {mode: program.graph for mode, program in programs.items()}
        super().__init__(tree, graphs, training, "RewrittenModule")
        self.programs = dict(programs)
        self.config, self.report, self.example_inputs = config, report, example_inputs

    def _move_graphs(self, device: torch.device) -> None:
        moved = {id(program): moved_program(program, device) for program in self.programs.values()}
        self.programs = {mode: moved[id(program)] for mode, program in self.programs.items()}
        self.graphs = {mode: program.graph for mode, program in self.programs.items()}
        move_attributes(self, self.graphs.values(), device)
        self.example_inputs = self.example_inputs.on(device)
        self._generate()

    def _why_one_mode(self, missing: str) -> str:
        return "".join(self.report.capture.notes) or super()._why_one_mode(missing)

    def _on(self, tree: nn.Module) -> "RewrittenModule":
        return RewrittenModule(tree, self.programs, self.training, self.config, self.report, self.example_inputs)


def moved_program(program: Program, device: torch.device) -> Program:
    """Return the same program on another device; the given one stays, as copies of a module share it."""
    original, copies = _moved(program.original, device)
    plans = tuple(map_plan(plan, copies) for plan in program.plans)
    return Program(_moved(program.graph, device)[0], original, plans)


def _moved(graph: fx.Graph, device: torch.device) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    graph, copies = copy_graph(graph)
    move_graph(graph, device)
    return graph, copies


def require_rewritten(new: object, function: str) -> None:
    """Raise TypeError when `new`, given to a public function of that name, is not a RewrittenModule."""
    if isinstance(new, RewrittenModule):
        return
    kind = type(new).__name__
    hint = ""
    if isinstance(new, ModalModule):
        hint = ". Give it the rewrite this was made of, after new.load_state_dict(model.state_dict())"
    elif isinstance(new, nn.Module) and any("_attnres_facts" in vars(part) for part in new.modules()):
        hint = ". Of an attached model, give it as_rewritten(model, args)"
    raise TypeError(f"{function}() takes what rewrite() or load() returned; this is a {kind}{hint}")


# what GraphModule.recompile leaves in the instance, beside the forward in its class
_GENERATED = frozenset(["_graph", "_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec"])


def adopt_tree(module: nn.Module, tree: nn.Module) -> None:
    """Make `module` use the very parameters, buffers, submodules and constants of `tree`."""
    for name in _TABLES:
        module.__dict__[name] = tree.__dict__[name]
    module.__dict__.update(constants_of(tree))


def copy_tree(module: nn.Module) -> nn.Module:
    """Return new plain modules that hold the very parameters, buffers, constants and graph bodies of `module`."""
    copied = nn.Module()
    adopt_tree(copied, module)
    for name in _TABLES:
        copied.__dict__[name] = copy.copy(module.__dict__[name])
    for name, child in module._modules.items():
        copied._modules[name] = child if child is None or isinstance(child, fx.GraphModule) else copy_tree(child)
    return copied


def constants_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the plain tensor attributes of a module: constants that the model's code made."""
    return {name: value for name, value in module.__dict__.items() if isinstance(value, torch.Tensor)}


def give_constants_as_defaults(forward: Any, graph: fx.Graph) -> None:
    """Let a call leave out trailing arguments that the capture took as constants, such as use_cache=False."""
    info = getattr(graph._codegen, "pytree_info", None)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = [name for name in info.orig_args if name != "self"] if info else []
    if len(names) != len(placeholders):
        return
    defaults: list[Any] = []
    for node in reversed(placeholders):
        value = node.meta.get("val", _MISSING)
        if value is not None and not isinstance(value, bool | str | int | float):
            break
        defaults.insert(0, value)
    if defaults:
        forward.__defaults__ = tuple(defaults)


_MISSING = object()


def merge_trees(programs: Mapping[bool, fx.GraphModule]) -> None:
    """Give all programs one tree of modules, in place.

    Parameters and buffers are one object already. What each capture made for itself, constants and the bodies
    of higher-order ops, is renamed where two programs use one name for different things.
    """
    first, *others = {id(program): program for program in programs.values()}.values()
    for other in others:
        for node in other.graph.nodes:
            if node.op in ("get_attr", "call_module"):
                node.target = _moved_into(first, other, node.target)
    for other in others:
        adopt_tree(other, first)


def _moved_into(tree: nn.Module, source: nn.Module, target: str) -> str:
    value = attribute(source, target)
    existing = attribute(tree, target, None)
    if existing is value:
        return target
    name = target
    while attribute(tree, name, None) is not None:
        name = f"{name}_other_mode"
    owner, _, leaf = name.rpartition(".")
    setattr(attribute(tree, owner), leaf, value)
    return name


def same_program(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Say whether two graphs make the same calls on the same parameters and on equal constants."""
    if len(one.graph.nodes) != len(other.graph.nodes):
        return False
    pairs = zip(one.graph.nodes, other.graph.nodes, strict=True)
    return all(_same_node(left, right, one, other) for left, right in pairs)


def _same_node(left: fx.Node, right: fx.Node, one: fx.GraphModule, other: fx.GraphModule) -> bool:
    calls = [(n.op, n.name, str(n.args), str(n.kwargs)) for n in (left, right)]
    if calls[0] != calls[1]:
        return False
    if left.op not in ("get_attr", "call_module"):
        return left.target == right.target
    values = attribute(one, str(left.target)), attribute(other, str(right.target))
    if values[0] is values[1]:
        return True
    if all(isinstance(value, fx.GraphModule) for value in values):
        return same_program(*values)
    # numbers on meta cannot be compared
    are_known = all(isinstance(value, torch.Tensor) and not value.is_meta for value in values)
    return are_known and torch.equal(*values)


_REQUIRED = object()


def attribute(root: Any, path: str, default: Any = _REQUIRED) -> Any:
    """Return an attribute by its dotted path; "" is the root itself."""
    value = root
    for part in path.split(".") if path else ():
        if default is not _REQUIRED and not hasattr(value, part):
            return default
        value = getattr(value, part)
    return value
