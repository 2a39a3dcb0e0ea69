"""--device: a loaded model -> the same one elsewhere, with what it is captured on."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attnres_rewrite.cli.load import Loaded

if TYPE_CHECKING:
    import torch


def device_from(text: str | None, meta: bool) -> "torch.device | None":
    """Read the option; None where it was not given.

    Raises:
        ValueError: It names no device of torch, or one that this machine has not.
    """
    import torch

    if text is None:
        return None
    if meta:
        raise ValueError(f"--meta builds tensors without data, which are on no device: leave out --device {text}")
    try:
        device = torch.device(text)
    except RuntimeError as why:
        raise ValueError(f"--device {text} is no device of torch, such as cpu, cuda or cuda:1") from why
    if device.type == "meta":
        raise ValueError("--device meta holds no numbers: --meta builds a Hugging Face folder without weights")
    try:
        torch.empty(0, device=device)
    # an AssertionError where torch was built without the device
    except (RuntimeError, AssertionError) as why:
        raise ValueError(
            f"--device {text}: this machine has no such device ({str(why).partition(chr(10))[0]})"
        ) from why
    return device


def on_device(found: Loaded, device: "torch.device") -> Loaded:
    """Move the model, and the inputs to capture it with."""
    from torch.export import ExportedProgram

    from attnres_rewrite.moving import exported_on

    args, kwargs = moved((found.args, found.kwargs), device)
    model = found.model
    model = exported_on(model, device) if isinstance(model, ExportedProgram) else model.to(device)
    return replace(found, model=model, args=args, kwargs=kwargs)


def moved(batch: Any, device: "torch.device") -> Any:
    """Move the tensors in a batch; one that has its own to(), as tokenizers return them, moves itself."""
    from torch import Tensor
    from torch.utils import _pytree as pytree

    if hasattr(batch, "to"):
        return batch.to(device)
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
