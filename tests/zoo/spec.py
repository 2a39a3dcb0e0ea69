"""One model of the zoo: how to build it, what to feed it, and what a rewrite must find in it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

BATCH, SEQUENCE = 2, 12
VOCAB, HIDDEN, LAYERS = 97, 64, 3

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Spec:
    """A model that is built when asked for, with random weights and no download.

    expected: updates of each stream, counted by hand from the model's source; or the name of the
        refusal; or None when nobody counted.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    expected: tuple[int, ...] | str | None = None


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights that let every branch matter, and put the model in eval mode.

    A fresh network is nearly the identity: small weights, zero gates, norms of gain one. A branch that
    a rewrite lost would hide in that.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen and parameter.is_floating_point():
                    seen.add(id(parameter))
                    _redraw_parameter(module, name, parameter, generator)
            # gemma4 scales its stream by a buffer that is one in a fresh network
            if isinstance(scalar := getattr(module, "layer_scalar", None), torch.Tensor):
                scalar.fill_(0.8)
    return model.eval()


# exponents of recurrences: a random redraw makes a state-space model explode
_RECURRENT = ("A_log", "dt_bias", "time_decay", "time_first", "dt_proj")
_LAYER_SCALES = ("gamma", "lambda", "layer_scale", "_gate")


def _redraw_parameter(module: nn.Module, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    if any(word in name for word in _RECURRENT):
        return
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() >= 2:
        parameter.copy_(noise * _std(module, parameter))
    elif any(word in name for word in _LAYER_SCALES):
        parameter.copy_(0.5 + 0.2 * noise)
    else:
        parameter.add_(0.1 * noise)


def _std(module: nn.Module, weight: torch.Tensor) -> float:
    if isinstance(module, nn.Embedding):
        return 1.0
    if type(module).__name__ == "Conv1D":  # GPT-2's linear layer, stored transposed
        return 1 / math.sqrt(weight.shape[0])
    # a bank of experts is [experts, ., .]: its fan-in is not all that follows the first axis
    fan_in = weight[0].numel() if weight.dim() == 2 or _is_convolution(module) else weight.shape[-1]
    return 1 / math.sqrt(max(fan_in, 1))


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d))


def token_ids(length: int = SEQUENCE, vocab: int = VOCAB, seed: int = 1, rows: int = BATCH) -> torch.Tensor:
    """Return ids [rows, length], none of them special (pad, bos and eos are 0, 1, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (rows, length), generator=generator)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    """Return standard normal numbers, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
