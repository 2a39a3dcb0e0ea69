"""One residual stream of a generated network: stem, layers, skips and injections.

The stream is (B, T, C), or laid out as spec.layout says:
    flat            the MLP runs on (B * T, C)
    tbc             every second layer runs on (T, B, C)
    grid            (B, h, w, C); mixers see shifted 2 x 2 windows
    channels_first  (B, C, T)
"""

import math

import torch
from torch import Tensor, nn

from .layers import Add, Finish, make_mlp, make_norm
from .mixers import Attention, Context, ScoreBias, make_mixer
from .specs import UNET, NetworkSpec

VOCABULARY = 13
FEATURES = 5
RESIDUAL_MULTIPLIER = 0.22
STREAM_MULTIPLIER, BRANCH_MULTIPLIER = 0.8, 0.6


def as_rows(x: Tensor, spec: NetworkSpec) -> Tensor:
    """(B, T, C) -> the layout in which the layers pass the stream on."""
    if spec.layout == "grid":
        return x.view(x.shape[0], 2, -1, x.shape[-1])
    return x.transpose(1, 2) if spec.layout == "channels_first" else x


def windows(x: Tensor, shift: int) -> Tensor:
    """(B, h, w, C) -> (B * h/2 * w/2, 4, C)."""
    x = torch.roll(x, (-shift, -shift), dims=(1, 2)) if shift else x
    b, h, w, c = x.shape
    return x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)


def unwindows(x: Tensor, shape: torch.Size, shift: int) -> Tensor:
    """Undo `windows`."""
    b, h, w, c = shape
    x = x.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
    return torch.roll(x, (shift, shift), dims=(1, 2)) if shift else x


class Spellings:
    """Hands out the spellings of a spec in turn, one to each add."""

    def __init__(self, spec: NetworkSpec) -> None:
        # a spec that is made smaller may have none
        self.cycle, self.used = spec.spellings or ("x + f",), 0

    def next_add(self) -> Add:
        self.used += 1
        return Add(self.cycle[(self.used - 1) % len(self.cycle)])

    def next_safe(self, injects: bool) -> Add:
        """An add whose f is used again elsewhere, or broadcast: f must not be overwritten."""
        spelling = self.next_add().spelling
        return Add("f + x" if spelling == "f += x" else spelling, injects)


class Layer(nn.Module):
    """One layer: the sub-layers that spec.residual names, each a norm, a body and an Add."""

    def __init__(self, spec: NetworkSpec, index: int, spellings: Spellings, cross: bool) -> None:
        super().__init__()
        self.spec, self.index = spec, index
        self.names = self._sub_layers(cross)
        bodies = {"attn": self._mixer, "cross": self._cross, "mlp": self._mlp}
        self.body = nn.ModuleDict({name: bodies[name]() for name in self.names})
        self.finish = nn.ModuleDict({name: Finish(spec) for name in self.names})
        self.norm = nn.ModuleDict({name: self._norm() for name in self.names if self._has_norm(name)})
        merged = spec.residual in ("(attn + mlp) + x", "x + (attn + mlp)")
        for name in self.names[:1] if merged else self.names:
            setattr(self, f"add_{name}", spellings.next_add())
        if spec.layer_scalar != "none":
            self.register_buffer("layer_scalar", torch.full((1,), 0.9))

    def _sub_layers(self, cross: bool) -> tuple[str, ...]:
        if self.spec.residual == "single":
            return (("attn", "mlp")[self.index % 2],)
        return ("attn", "cross", "mlp") if cross else ("attn", "mlp")

    def _mixer(self) -> nn.Module:
        mixers = self.spec.mixers
        return make_mixer(mixers[self.index % len(mixers)], self.spec)

    def _cross(self) -> nn.Module:
        return Attention(self.spec, cross=True)

    def _mlp(self) -> nn.Module:
        mlps = self.spec.mlps
        return make_mlp(mlps[self.index % len(mlps)], self.spec)

    def _norm(self) -> nn.Module:
        return make_norm(self.spec.norm, self.spec.width)

    def _has_norm(self, name: str) -> bool:
        shared = self.spec.shared_norm and name == "mlp"
        return self.spec.norm_place != "branch_output" and not shared

    def forward(self, x: Tensor, context: Context) -> Tensor:
        swapped = self.spec.layout == "tbc" and self.index % 2 == 1
        x = x.transpose(0, 1) if swapped else x
        x = self._update(x, context, swapped)
        x = x.transpose(0, 1) if swapped else x
        if self.spec.layer_scalar == "x * s":
            x = x * self.layer_scalar
        elif self.spec.layer_scalar == "x *= s":
            x *= self.layer_scalar
        return x

    def _update(self, x: Tensor, context: Context, swapped: bool) -> Tensor:
        if self.spec.residual in ("sequential", "single"):
            for name in self.names:
                x = self._sequential(name, x, context, swapped)
            return x
        h = self._read("attn", x)
        attn = self._branch("attn", h, context, swapped)
        h = h if self.spec.shared_norm else self._read("mlp", x)
        mlp = self._branch("mlp", h, context, swapped)
        if self.spec.residual == "(x + attn) + mlp":
            return self._add("mlp", self._add("attn", x, attn), mlp)
        return self._add("attn", x, attn + mlp)

    def _sequential(self, name: str, x: Tensor, context: Context, swapped: bool) -> Tensor:
        shape = x.shape
        flat = self.spec.layout == "flat" and name == "mlp"
        x = x.reshape(-1, shape[-1]) if flat else x
        x = self._add(name, x, self._branch(name, self._read(name, x), context, swapped))
        return x.view(shape) if flat else x

    def _read(self, name: str, x: Tensor) -> Tensor:
        """Norm of the stream, channels last."""
        x = x.transpose(1, 2) if self.spec.layout == "channels_first" else x
        return self.norm[name](x) if name in self.norm else x

    def _branch(self, name: str, h: Tensor, context: Context, swapped: bool) -> Tensor:
        """Body and finish, back in the layout of the stream."""
        f = self.body[name](h) if name == "mlp" else self._mix(name, h, context, swapped)
        f = self.finish[name](f)
        return f.transpose(1, 2) if self.spec.layout == "channels_first" else f

    def _mix(self, name: str, h: Tensor, context: Context, swapped: bool) -> Tensor:
        if self.spec.layout == "grid":
            return unwindows(self.body[name](windows(h, self.index % 2), context), h.shape, self.index % 2)
        if swapped:
            return self.body[name](h.transpose(0, 1), context).transpose(0, 1)
        return self.body[name](h, context)

    def _add(self, name: str, x: Tensor, f: Tensor) -> Tensor:
        if self.spec.scaling == "branch":
            f = f * RESIDUAL_MULTIPLIER
        elif self.spec.scaling == "both":
            x, f = x * STREAM_MULTIPLIER, f * BRANCH_MULTIPLIER
        if self.spec.casts == "x.to(float32)":
            x, f = x.to(torch.float32), f.to(torch.float32)
        elif self.spec.casts == "x.float()":
            x, f = x.float(), f.float()
        return getattr(self, f"add_{name}")(x, f)


class Stem(nn.Module):
    """Input -> root of the stream, (B, T, C). What it adds comes before the stream."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        width, length = spec.width, spec.length + spec.class_token
        makers = {
            "tokens": lambda: nn.Embedding(VOCABULARY, width),
            "features": lambda: nn.Linear(FEATURES, width),
            "image": lambda: nn.Conv2d(3, width, kernel_size=2, stride=2),
        }
        self.embed = makers[spec.source]()
        self.norm = make_norm(spec.norm, width) if spec.embed_norm else None
        self.drop = nn.Dropout(0.1) if spec.embed_dropout else None
        if spec.class_token:
            self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        if spec.position == "learned":
            self.position = nn.Embedding(length, width)
        elif spec.position == "parameter":
            self.position = nn.Parameter(torch.zeros(1, length, width))

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.embed(inputs)
        if self.spec.source == "image":
            x = x.flatten(2).transpose(1, 2)
        if self.spec.embed_scale:
            x = x * math.sqrt(self.spec.width)
        if self.spec.class_token:
            x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self._add_position(x)
        for part in (self.norm, self.drop):
            x = x if part is None else part(x)
        return x

    def _add_position(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        if self.spec.position == "learned":
            return x + self.position(at)
        if self.spec.position == "parameter":
            return x + self.position
        if self.spec.position == "sinusoidal":
            speed = 100.0 ** -(torch.arange(x.shape[-1], device=x.device, dtype=x.dtype) / x.shape[-1])
            return x + torch.sin(at.to(x.dtype)[:, None] * speed)
        return x


class Injection(nn.Module):
    """A term that does not read the stream: from a condition [B, F] or [B, T, F], or a parameter."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.inject_shape == "vector":
            self.vector = nn.Parameter(torch.zeros(spec.width))
        else:
            self.body = nn.Sequential(nn.Linear(FEATURES, spec.width), nn.SiLU(), nn.Linear(spec.width, spec.width))

    def forward(self, condition: Tensor | None) -> Tensor:
        if self.spec.inject_shape == "vector":
            first = self.spec.layout == "channels_first"
            return self.vector[:, None] if first else self.vector
        assert condition is not None
        e = self.body(condition)
        if self.spec.inject_shape == "token":
            return as_rows(e, self.spec)
        if self.spec.layout == "channels_first":
            return e[:, :, None]
        return e[:, None, None, :] if self.spec.layout == "grid" else e[:, None, :]


class Stack(nn.Module):
    """Stem, layers and final norm of one stream. `main` stacks hold the injections."""

    def __init__(self, spec: NetworkSpec, main: bool, cross: bool = False) -> None:
        super().__init__()
        self.spec = spec
        spellings = Spellings(spec)
        self.stem = Stem(spec)
        self.bias = ScoreBias(spec) if spec.scores in ("mask", "alibi", "relative") else None
        layers = []
        self.inject_at, self.skip_at = self._places(main)
        self.add_inject, self.add_skip, self.project = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for index in range(spec.layers):
            if index in self.skip_at:
                self.add_skip[str(index)] = spellings.next_safe(injects=False)
                if spec.skip == "unet_projected":
                    self.project[str(index)] = nn.Linear(spec.width, spec.width)
            if index in self.inject_at:
                self.add_inject[str(index)] = spellings.next_safe(injects=True)
            layers.append(Layer(spec, index, spellings, cross))
        if spec.layers in self.inject_at:
            self.add_inject[str(spec.layers)] = spellings.next_safe(injects=True)
        self.layers = nn.ModuleList(layers)
        self.injection = Injection(spec) if self.inject_at else None
        self.norm = make_norm(spec.norm, spec.width) if spec.final_norm else None

    def _places(self, main: bool) -> tuple[frozenset[int], frozenset[int]]:
        """Return in front of which layers an injection and a skip are added."""
        layers = self.spec.layers
        inject = {
            "none": (),
            "front": (0,),
            "middle": (max(1, layers // 2),),
            "every": range(layers),
            "tail": (layers,),
        }[self.spec.inject]
        skip: range | tuple[int, ...] = ()
        if self.spec.skip in UNET:
            skip = range(layers - layers // 2, layers)
        elif self.spec.skip == "root":
            skip = range(1, layers)
        return frozenset(inject if main else ()), frozenset(skip)

    def forward(
        self, inputs: Tensor, condition: Tensor | None = None, memory: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last state, un-normed, and the states in front of each layer."""
        x = self.stem(inputs)
        bias = None
        if self.bias is not None:
            batch, length = x.shape[:2]
            in_windows = self.spec.layout == "grid"
            bias = self.bias(batch * length // 4, 4, x) if in_windows else self.bias(batch, length, x)
        context = Context(bias, memory)
        x = as_rows(x, self.spec)
        e = None if self.injection is None else self.injection(condition)
        if 0 in self.inject_at:
            x = self.add_inject["0"](x, e)
        states: list[Tensor] = []
        for _ in range(self.spec.loops):
            for index, layer in enumerate(self.layers):
                x = self._add_skip(x, index, states)
                if index in self.inject_at and index > 0:
                    x = self.add_inject[str(index)](x, e)
                states.append(x)
                x = layer(x, context)
        if self.spec.layers in self.inject_at:
            x = self.add_inject[str(self.spec.layers)](x, e)
        return x, states

    def _add_skip(self, x: Tensor, index: int, states: list[Tensor]) -> Tensor:
        if index not in self.skip_at:
            return x
        add = self.add_skip[str(index)]
        if self.spec.skip == "root":
            return add(x * 0.75, states[0] * 0.25)
        # the state in front of layer k + 1 is the one that layer k made
        mirror = self.spec.layers - index
        older = x if mirror == index else states[mirror]
        if self.spec.skip == "unet_scaled":
            older = older * 0.5
        elif self.spec.skip == "unet_projected":
            older = self._project(older, index)
        return add(x, older)

    def _project(self, older: Tensor, index: int) -> Tensor:
        linear = self.project[str(index)]
        if self.spec.layout == "channels_first":
            return linear(older.transpose(1, 2)).transpose(1, 2)
        return linear(older)
