"""Let a rewritten graph run under autocast.

    _assert_tensor_metadata(h, dtype=float32, device=cpu)   ->   check_captured(h, float32, cpu)

torch.export writes the assertion before a cast, as the graph has the dtype of x.to(y.dtype) as a constant. Under
autocast a tensor of the autocast dtype comes where float32 was captured. Then the cast makes it float32 again, which
only keeps precision; every other dtype is refused, with what to do about it.
"""

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

_ASSERTION = torch.ops.aten._assert_tensor_metadata.default


@fx.wrap
def check_captured(value: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Raise TypeError when a value has another dtype or device than captured; autocast may lower float32."""
    kind = value.device.type
    if device is not None and kind != device.type:
        raise TypeError(
            f"a tensor is on {value.device} and was captured on {device}: a captured graph keeps its device. "
            f"Move what was rewritten, with its method to({kind!r}): it takes the graph along"
        )
    if dtype is None or value.dtype == dtype:
        return
    if dtype == torch.float32 and torch.is_autocast_enabled(kind) and value.dtype == torch.get_autocast_dtype(kind):
        return
    raise TypeError(
        f"a tensor is {value.dtype} and was captured as {dtype}: a captured graph keeps its precision. "
        f"Rewrite the model in {value.dtype}, or keep it in float32 and call it under torch.autocast"
    )


has_side_effect(check_captured)


def relax_checks(graph: fx.Graph) -> None:
    """Replace the assertions of torch.export, in place."""
    for node in list(graph.find_nodes(op="call_function", target=_ASSERTION)):
        dtype, device = (node.kwargs.get(name) for name in ("dtype", "device"))
        with graph.inserting_before(node):
            check = graph.call_function(check_captured, (node.args[0], dtype, device))
        check.meta = dict(node.meta)
        graph.erase_node(node)
