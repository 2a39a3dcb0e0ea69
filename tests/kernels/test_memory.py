"""What a compiled training step keeps for its backward: partial sums and scalars, not the phase-1 results."""

import pytest
import torch
from torch import Tensor

from attnres_rewrite.kernels.inter_block.op import inter_block_by_kernel
from attnres_rewrite.kernels.merge.op import add_merge_norm_by_kernel
from attnres_rewrite.kernels.routes import reset_launches
from tests.kernels.budget import drawn, launched

pytestmark = pytest.mark.usefixtures("language")

TOKENS, WIDTH, NUM_READS = 6, 20, 3


def block(inputs: list[Tensor]) -> Tensor:
    """Three reads of one block, each with its add and norm, around sub-layers that are a sine."""
    root, older, partial, *queries = inputs
    outs, lses = inter_block_by_kernel([root, older], queries, None, 1e-6)
    read = partial
    for out, lse, query in zip(outs, lses, queries, strict=True):
        partial, read = add_merge_norm_by_kernel(
            partial, torch.sin(read), out, lse, query, None, None, None, 1e-6, 1e-6, 3.0, "rms"
        )
    return read


def inputs_of() -> list[Tensor]:
    rows = [drawn(TOKENS, WIDTH, seed=seed) for seed in range(3)]
    return rows + [drawn(WIDTH, seed=10 + seed) for seed in range(NUM_READS)]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_phase_1_results_are_made_again_once_a_block():
    inputs = inputs_of()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition")
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):
        out = compiled(inputs)
    given = {tensor.data_ptr() for tensor in inputs}
    rows = [t for t in kept.values() if t.numel() == TOKENS * WIDTH and t.data_ptr() not in given]
    # the partial sum of each read, and what the two sines between them keep
    assert len(rows) <= NUM_READS + 2
    reset_launches()
    ours = torch.autograd.grad(out.square().sum(), inputs)
    assert launched() == {"inter_block.forward": 1, "add_merge_norm.backward": 3, "inter_block.backward": 1}
    theirs = torch.autograd.grad(block(inputs).square().sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_operations_work_under_activation_checkpointing():
    inputs = inputs_of()
    again = torch.utils.checkpoint.checkpoint(block, inputs, use_reentrant=False)
    for one, other in zip(
        torch.autograd.grad(again.sum(), inputs), torch.autograd.grad(block(inputs).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
