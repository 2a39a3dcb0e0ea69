"""A batch as it comes from a data loader -> the inputs of a captured program, and a loss of its outputs.

A batch is a tensor, a tuple or list of positional inputs, or a mapping of inputs by name.
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from attnres_rewrite.config import dtype_name
from attnres_rewrite.inputs import flat_inputs

Loss = Callable[[Any, Any], Tensor]

LABELS, DECODED = "labels", "decoder_input_ids"
IGNORED = -100  # a label that counts for nothing, as in torch and transformers


@dataclass(frozen=True, slots=True)
class Inputs:
    """One batch as a call. Labels are kept out of it when the captured program takes none."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any

    def leaves(self, graph: fx.Graph) -> list[Any]:
        """Return the flat inputs of the captured program.

        Raises:
            TypeError: It takes others.
        """
        try:
            return flat_inputs(graph, self.args, self.kwargs)
        except TypeError as why:
            raise TypeError(
                f"a batch has other inputs than the network: {why}. Leave out what it does not take, or rewrite the "
                f'model on example inputs that have it; what is for the loss alone goes under "{LABELS}" of a mapping '
                "of the inputs by name"
            ) from why


def inputs_of(batch: Any, graph: fx.Graph) -> Inputs:
    """Read a batch for the captured program `graph`.

    Raises:
        TypeError: It is no batch.
    """
    if isinstance(batch, Tensor):
        return Inputs((batch,), {}, None)
    if isinstance(batch, Mapping):
        named = {str(name): value for name, value in batch.items()}
        labels = named.get(LABELS)
        if LABELS not in _names(graph):
            named.pop(LABELS, None)
        return Inputs((), named, labels)
    if isinstance(batch, tuple | list):
        return Inputs(tuple(batch), {}, None)
    raise TypeError(
        f"a batch is a tensor, a tuple or list of inputs, or a mapping of inputs by name; got {type(batch).__name__}"
    )


def _names(graph: fx.Graph) -> set[str]:
    info = getattr(graph._codegen, "pytree_info", None)
    return {node.target for node in graph.find_nodes(op="placeholder")} if info is None else set(info.orig_args)


@contextmanager
def naming_batch(number: int, leaves: Sequence[Any], examples: Sequence[Any]) -> Generator[None]:
    """Note on what the network or the loss raises which batch that was, and what the network was captured on."""
    try:
        yield
    except Exception as why:
        why.add_note(f"in batch {number}, {_sizes(leaves)}; the network was captured on {_sizes(examples)}")
        raise


def _sizes(leaves: Sequence[Any]) -> str:
    return " and ".join(_size(leaf) for leaf in leaves if isinstance(leaf, Tensor)) or "no tensors"


def _size(value: Tensor) -> str:
    text = f"{dtype_name(value.dtype)} {list(value.shape)}"
    # a device that failed answers nothing more
    if value.dtype not in _INTEGERS or value.device.type != "cpu" or not value.numel():
        return text
    return f"{text} from {int(value.min())} to {int(value.max())}"


def loss_of(outputs: Any, batch: Any, inputs: Inputs, loss_fn: Loss | None) -> Tensor:
    """Return the loss [] of a batch.

    Raises:
        ValueError: It is no one number, or hangs on nothing that is differentiated; or there is none to compute.
    """
    loss = _default_loss(outputs, inputs) if loss_fn is None else loss_fn(outputs, batch)
    # callers are not all type-checked
    if not isinstance(loss, Tensor) or loss.numel() != 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"loss_fn(outputs, batch) must return a tensor of one element; got {shape}")
    if not loss.requires_grad:
        raise ValueError(
            "the loss has no gradient: it does not depend on the outputs, loss_fn detached them, or this runs under "
            "torch.inference_mode()"
        )
    return loss.reshape(())


def _default_loss(outputs: Any, inputs: Inputs) -> Tensor:
    """Return the outputs' own loss, else the next-token cross-entropy of the logits among them."""
    own = _named(outputs, "loss")
    if isinstance(own, Tensor):
        return own
    targets: Any = _tokens(inputs) if inputs.labels is None else inputs.labels
    # a decoder is fed its labels one place later, so those stand where they are predicted
    is_aligned = inputs.labels is not None and DECODED in inputs.kwargs
    logits = _logits(outputs, targets)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide, wanted = (wide, targets) if is_aligned else (wide[:, :-1], targets[:, 1:])
    return F.cross_entropy(wide.flatten(0, 1), wanted.flatten().long(), ignore_index=IGNORED)


def _named(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _logits(outputs: Any, targets: Any) -> Tensor:
    """Return the output called "logits", else the only one that could be.

    Raises:
        ValueError: There is none, or a hidden state of the same form, which passes for logits without an error.
    """
    named = _named(outputs, "logits")
    found = [value for value in pytree.tree_leaves(outputs if named is None else named) if _fits(value, targets)]
    if len(found) == 1:
        return found[0]
    if found:
        shapes = " and ".join(str(list(value.shape)) for value in found)
        raise ValueError(
            f'{len(found)} outputs could be logits [batch, length, vocabulary], {shapes}, and none is called "logits"; '
            "give loss_fn(outputs, batch)"
        )
    raise ValueError(
        "the outputs have no loss, and no logits [batch, length, vocabulary] that fit labels or token ids "
        "[batch, length] of the batch, of two tokens or more; give loss_fn(outputs, batch)"
    )


def _fits(logits: Any, targets: Any) -> bool:
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() != 3:
        return False
    if not isinstance(targets, Tensor) or targets.dtype not in _INTEGERS:
        return False
    return logits.shape[:2] == targets.shape and targets.shape[1] > 1


def _tokens(inputs: Inputs) -> Tensor | None:
    """Return the ids that a decoder predicts the next of, those of that name, or the first integers of the call."""
    named = [inputs.kwargs.get(name) for name in (DECODED, "input_ids")]
    # a mask and positions are of integers, too
    others = [value for name, value in inputs.kwargs.items() if not _NO_IDS.search(name)]
    leaves = pytree.tree_leaves((named, inputs.args, others))
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype in _INTEGERS), None)


_INTEGERS = frozenset({torch.int64, torch.int32})
_NO_IDS = re.compile("mask|position|token_type")
