"""Random residual networks whose updates are known.

build(NetworkSpec) -> Generated: a module in eval mode, its inputs, and for each stream the FQNs of the
Adds that are true updates, in the order in which they run.

Leading and trailing injections are not updates: the first moves the root, the last is a reader.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .layers import Add, HandRMSNorm, LayerScale
from .specs import NetworkSpec, mixes_in_place, why_not
from .stack import FEATURES, VOCABULARY, Stack

CLASSES = 7


@dataclass
class ModelOutput:
    """The dataclass that some networks return."""

    logits: Tensor
    loss: Tensor | None = None
    aux: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None


pytree.register_dataclass(ModelOutput)


@dataclass(frozen=True, slots=True)
class Generated:
    """A network and the truth about it."""

    model: nn.Module  # in eval mode
    args: tuple[Any, ...]
    known: tuple[tuple[str, ...], ...]  # FQN of each update's Add, stream by stream
    mean_preserves: bool  # all consumers of states after the root go through a norm
    trainable: bool  # False: autograd may refuse the original, its adds overwrite what norms saved


class Network(nn.Module):
    """One or two stacks, and what is made of their last states."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        two = spec.topology == "two_towers"
        names = {
            "single": ("stack",),
            "encoder_decoder": ("encoder", "decoder"),
            "two_towers": ("left", "right"),
        }[spec.topology]
        self.names = names
        for name in names[:-1]:
            setattr(self, name, Stack(spec, main=False))
        setattr(self, names[-1], Stack(spec, main=True, cross=spec.topology == "encoder_decoder"))
        width = spec.width * (1 + two)
        classes = VOCABULARY if spec.head == "tied" else CLASSES
        self.head = None if spec.head == "none" else nn.Linear(width, classes, bias=spec.head == "linear")
        if self.head is not None and spec.head == "tied":
            self.head.weight = getattr(self, names[-1]).stem.embed.weight
        self.aux = nn.Linear(spec.width, 3) if spec.reader == "aux" else None

    def forward(
        self,
        first: Tensor,
        second: Tensor | None = None,
        condition: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        out, states = self._run(first, second, condition)
        logits = out if self.head is None else self.head(out)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        aux = None if self.aux is None else self.aux(self._last(states[self.spec.layers // 2]))
        hidden = tuple(states) if self.spec.reader == "collect" else None
        return self._pack(ModelOutput(logits, loss, aux, hidden))

    def _run(self, first: Tensor, second: Tensor | None, condition: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        main = getattr(self, self.names[-1])
        if self.spec.topology == "single":
            x, states = main(first, condition)
            return self._finish(x, main), states
        assert second is not None
        other = getattr(self, self.names[0])
        y, _ = other(first)
        if self.spec.topology == "two_towers":
            x, states = main(second, condition)
            return torch.cat((self._finish(y, other), self._finish(x, main)), dim=-1), states
        y = self._last(y)
        memory = y if other.norm is None else other.norm(y)
        x, states = main(second, condition, memory)
        return self._finish(x, main), states

    def _last(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.spec.layout == "channels_first" else x

    def _finish(self, x: Tensor, stack: Stack) -> Tensor:
        """Pool and norm the last state, in the order that the spec asks for."""
        x = self._last(x)
        if self.spec.pool == "first_before_norm":
            x = x[:, 0]
        x = x if stack.norm is None else stack.norm(x)
        if self.spec.pool == "first":
            return x[:, 0]
        return x.flatten(1, -2).mean(dim=1) if self.spec.pool == "mean" else x

    def _pack(self, out: ModelOutput) -> Any:
        present = {
            name: value for name in ("loss", "logits", "aux", "hidden") if (value := getattr(out, name)) is not None
        }
        if self.spec.output == "tensor":
            return out.logits if out.loss is None else out.loss
        if self.spec.output == "tuple":
            return tuple(present.values())
        return present if self.spec.output == "dict" else out


def build(spec: NetworkSpec) -> Generated:
    """Make the network of `spec`; the same spec gives the same weights and inputs."""
    conflict = why_not(spec)
    if conflict is not None:
        raise ValueError(f"{spec} makes no network: {conflict.reason}")
    # the modules' own initialisation draws from the global generator
    with torch.random.fork_rng(devices=[]):
        model = Network(spec).eval()
    draw = torch.Generator().manual_seed(spec.seed)
    redraw(model, draw)
    args = _make_args(spec, draw)
    return Generated(model, args, known_updates(model, args), _mean_preserves(spec), not mixes_in_place(spec))


def redraw(model: nn.Module, draw: torch.Generator) -> None:
    """Draw weights under which every branch matters."""

    def normal(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=draw)

    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if isinstance(module, (nn.LayerNorm, nn.RMSNorm, HandRMSNorm)) and name == "weight":
                    gemma = isinstance(module, HandRMSNorm) and module.spelling == "rms_gemma"
                    p.copy_((0.0 if gemma else 1.0) + 0.1 * normal(p))
                elif isinstance(module, LayerScale):
                    p.copy_(0.5 + 0.1 * normal(p))
                elif isinstance(module, nn.Embedding) or name not in ("weight", "bias"):
                    p.copy_(0.5 * normal(p))
                elif p.dim() > 1:
                    p.copy_(normal(p) / p[0].numel() ** 0.5)
                else:
                    p.copy_(0.1 * normal(p))


def known_updates(model: nn.Module, args: tuple[Any, ...]) -> tuple[tuple[str, ...], ...]:
    """Run the model and list the Adds that ran, stream by stream, less leading and trailing injections."""
    calls: dict[str, list[tuple[str, bool]]] = {name: [] for name in model.names}
    hooks = []
    for fqn, module in model.named_modules():
        if isinstance(module, Add):
            ran = calls[fqn.split(".")[0]]
            hooks.append(module.register_forward_hook(_recorder(ran, fqn, module.injects)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model(*args)
    for hook in hooks:
        hook.remove()
    return tuple(tuple(_trim(ran)) for ran in calls.values())


def _recorder(ran: list[tuple[str, bool]], fqn: str, injects: bool) -> Any:
    def record(*_: Any) -> None:
        ran.append((fqn, injects))

    return record


def _trim(ran: list[tuple[str, bool]]) -> Iterator[str]:
    """Drop the injections in front of the first update and behind the last."""
    true = [at for at, (_, injects) in enumerate(ran) if not injects]
    return (fqn for fqn, _ in ran[true[0] : true[-1] + 1])


def _mean_preserves(spec: NetworkSpec) -> bool:
    raw = spec.norm_place == "branch_output" or spec.skip != "none" or spec.reader != "none"
    return spec.final_norm and not raw and spec.inject != "tail"


def _make_args(spec: NetworkSpec, draw: torch.Generator) -> tuple[Any, ...]:
    """Return (first, second, condition, labels) without the Nones at the end."""
    batch, length = spec.batch, spec.length
    inputs = [_make_input(spec, draw) for _ in range(1 + (spec.topology != "single"))]
    condition = labels = None
    if spec.inject != "none" and spec.inject_shape != "vector":
        shape = (batch,) if spec.inject_shape == "batch" else (batch, length + spec.class_token)
        condition = torch.randn(*shape, FEATURES, generator=draw)
    if spec.loss:
        shape = (batch,) if spec.pool != "none" else (batch, length + spec.class_token)
        labels = torch.randint(0, CLASSES, shape, generator=draw)
    args: list[Any] = [inputs[0], inputs[1] if len(inputs) > 1 else None, condition, labels]
    while args[-1] is None:
        args.pop()
    return tuple(args)


def _make_input(spec: NetworkSpec, draw: torch.Generator) -> Tensor:
    if spec.source == "tokens":
        return torch.randint(0, VOCABULARY, (spec.batch, spec.length), generator=draw)
    if spec.source == "features":
        return torch.randn(spec.batch, spec.length, FEATURES, generator=draw)
    return torch.randn(spec.batch, 3, 4, spec.length, generator=draw)
