"""The FX node of a read. In the graph it is one call, whatever runs behind it:

%read = block_attn_res(sources=[%embedding, %block_1, %partial], query=%q, key_norm=%g, eps=1e-6, output="sum")
"""

from collections.abc import Sequence

from torch import Tensor, fx

from attnres_rewrite.kernels.read import reference


@fx.wrap
def block_attn_res(
    sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, output: str
) -> Tensor:
    """Mix the sources of one state; see reference.block_attn_res for the formula, shapes and dtypes."""
    return reference.block_attn_res(sources, query, key_norm, eps, output)
