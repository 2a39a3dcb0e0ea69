"""Mirrors attnres_rewrite/kernels/variant_read/op.py: there is no kernel, and every call says so."""

import torch

from attnres_rewrite.kernels.routes import launches, reset_launches
from attnres_rewrite.kernels.variant_read import op, reference

SOURCES = [torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
QUERY = torch.linspace(-1, 1, 8)


def test_it_is_counted_with_the_reason():
    reset_launches()
    for options in ((4, None, 0.0), (1, 3, 0.0), (1, None, 2.0), (2, None, 2.0)):
        query = QUERY[: options[1]] if options[1] else QUERY
        found = op.variant_attn_res(SOURCES, query, None, 1e-6, "mean", *options)
        torch.testing.assert_close(
            found, reference.variant_attn_res(SOURCES, query, None, 1e-6, "mean", *options), rtol=0, atol=0
        )
    assert launches() == {
        "variant_read: plain (no kernel for num_heads=4)": 1,
        "variant_read: plain (no kernel for key_rank=3)": 1,
        "variant_read: plain (no kernel for recency_bias=2.0)": 1,
        "variant_read: plain (no kernel for num_heads=2 and recency_bias=2.0)": 1,
    }


def test_weights_have_heads_only_where_there_are_several():
    _, one = op.variant_read_with_weights(SOURCES, QUERY, None, 1e-6, "mean", 1, None, 1.0)
    _, four = op.variant_read_with_weights(SOURCES, QUERY, None, 1e-6, "mean", 4, None, 0.0)
    assert one.shape == (3, 3)
    assert four.shape == (3, 4, 3)
    assert not four.requires_grad


def test_compiled_code_is_one_graph_and_the_same():
    def both(sources, query):
        return op.variant_attn_res(sources, query, None, 1e-6, "sum", 4, None, 1.0)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(SOURCES, QUERY), both(SOURCES, QUERY))
