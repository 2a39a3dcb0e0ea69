"""Inductor's C++ of torch before 2.14 computes wrong numbers in some reductions: issue 185702 of pytorch.

It fuses loops over rows, and what passes from one to the next stays in a buffer of one row. The buffer is one row
also where the vectorized loop takes 16 at a time. The gradients of reads between permuted axes are such loops.
"""

import functools
from typing import Any

import torch

MENDED_IN = "2.14"


@functools.cache
def mend_inductor() -> None:
    """Make Inductor do as torch 2.14 does, for everything that this process compiles: no buffer in vectorized loops."""
    if torch.__version__ >= MENDED_IN:
        return
    from torch._inductor import config
    from torch._inductor.codegen.cpp import OuterLoopFusedSchedulerNode
    from torch._inductor.virtualized import V

    fused_node: Any = OuterLoopFusedSchedulerNode
    check = fused_node.check_outer_fusion_loop_level_attr

    def checked(self: Any, kernels: list[Any], depth: int) -> bool:
        fused = (loop for kernel in kernels for loop in kernel.loop_nest.loops[:depth])
        if V.local_buffer_context.local_buffers and any(loop.steps != 1 for loop in fused):
            return False  # Inductor generates the code anew then, without buffers
        return check(self, kernels, depth)

    fused_node.check_outer_fusion_loop_level_attr = checked
    # every configuration is part of the keys of torch's caches, where code from before may lie
    config.unsafe_marked_cacheable_functions = {**config.unsafe_marked_cacheable_functions, __name__: MENDED_IN}
