"""Mirrors attnres_rewrite/functional.py: what the operations promise, and what they say about wrong arguments."""

import re

import pytest
import torch

from attnres_rewrite import functional as F


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


SOURCES = [drawn(2, 3, 8) + index for index in range(3)]
QUERY, GAIN = drawn(8), drawn(8) + 1


@pytest.mark.parametrize("output", ["mean", "sum"])
def test_two_phases_give_what_the_direct_read_gives(output):
    direct = F.attn_res_read(SOURCES, QUERY, GAIN, output=output)
    (out,), (lse,) = F.inter_block(SOURCES[:-1], [QUERY], [GAIN])
    merged = F.merge(out, lse, SOURCES[-1], QUERY, GAIN, output=output, num_sources=3)
    torch.testing.assert_close(merged, direct)


def test_the_fused_form_is_the_three_steps():
    outs, lses = F.inter_block(SOURCES[:-1], [QUERY, GAIN])
    update, weight = drawn(2, 3, 8), drawn(8)
    total, normed = F.add_merge_norm(SOURCES[-1], update, outs[1], lses[1], GAIN, None, weight, None, 1e-5)
    torch.testing.assert_close(total, SOURCES[-1] + update)
    mix = F.merge(outs[1], lses[1], total, GAIN)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(mix, (8,), weight, 1e-5))


def test_the_weights_are_the_softmax_over_depth():
    mix, weights = F.attn_res_read(SOURCES, QUERY, GAIN, return_weights=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close((torch.stack(SOURCES, -1) * weights.unsqueeze(-2)).sum(-1), mix)


def test_zero_queries_give_the_plain_mean_and_sum():
    zero = torch.zeros(8)
    torch.testing.assert_close(F.attn_res_read(SOURCES, zero), sum(SOURCES) / 3)
    torch.testing.assert_close(F.attn_res_read(SOURCES, zero, output="sum"), sum(SOURCES))


def test_no_tokens():
    sources = [torch.zeros(0, 8) for _ in range(2)]
    outs, lses = F.inter_block(sources, [QUERY, QUERY])
    assert [out.shape for out in outs] == [(0, 8)] * 2
    assert F.merge(outs[0], lses[0], sources[0], QUERY).shape == (0, 8)


def test_eager_calls_are_counted_with_the_reason():
    F.reset_launches()
    F.attn_res_read(SOURCES, QUERY)
    assert F.launches() == {"read: plain (cpu)": 1}


BAD_SOURCES = [
    ([], ValueError, "sources is empty"),
    (torch.zeros(3, 8), TypeError, "never stacked"),
    ([torch.zeros(8), torch.zeros(2, 8)], ValueError, r"sources\[1\] has shape \(2, 8\), sources\[0\] has \(8,\)"),
    ([torch.zeros(2, 8), torch.zeros(2, 7)], ValueError, r"\(2, 7\), sources\[0\] has \(2, 8\)"),
    ([torch.zeros(8), torch.zeros(8).half()], ValueError, "torch.float16, sources.0. has torch.float32"),
    ([torch.zeros(8), torch.zeros(8, device="meta")], ValueError, "device meta, sources.0. has cpu"),
    ([torch.zeros(8, dtype=torch.long)], TypeError, "must be a floating-point tensor, not a torch.int64"),
    ([torch.zeros(8), None], TypeError, "NoneType"),
    ([torch.tensor(1.0)], ValueError, "no dimensions"),
    ([torch.zeros(2, 0)], ValueError, "0 channels"),
    ([torch.zeros(1, 16385)], ValueError, "16385 channels; they must be 1 to 16384"),
    ([torch.zeros(8)] * 257, ValueError, "257 tensors; the limit is 256"),
]


@pytest.mark.parametrize(("sources", "error", "message"), BAD_SOURCES)
def test_sources_that_cannot_be_mixed(sources, error, message):
    with pytest.raises(error, match=message):
        F.attn_res_read(sources, QUERY)
    with pytest.raises(error, match=message):
        F.inter_block(sources, [QUERY])


BAD_ARGUMENTS = [
    ({"query": torch.zeros(7)}, ValueError, r"query has shape \(7,\); the sources have 8 channels"),
    ({"query": torch.zeros(1, 8)}, ValueError, r"query has shape \(1, 8\)"),
    ({"query": [0.0] * 8}, TypeError, "query must be a floating-point tensor, not list"),
    ({"query": torch.zeros(8, device="meta")}, ValueError, "query is on meta, the sources are on cpu"),
    ({"key_norm": torch.zeros(9)}, ValueError, "key_norm has shape"),
    ({"eps": 0.0}, ValueError, "eps=0.0 must be positive"),
    ({"output": "max"}, ValueError, "output='max' must be"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
def test_wrong_arguments_of_a_read(change, error, message):
    with pytest.raises(error, match=message):
        F.attn_res_read(**{"sources": SOURCES, "query": QUERY} | change)


def test_wrong_arguments_of_phase_1():
    with pytest.raises(ValueError, match="queries is empty"):
        F.inter_block(SOURCES, [])
    with pytest.raises(ValueError, match=r"queries\[1\] has shape"):
        F.inter_block(SOURCES, [QUERY, QUERY[:3]])
    with pytest.raises(ValueError, match="1 key_norms for 2 queries"):
        F.inter_block(SOURCES, [QUERY, QUERY], [GAIN])


def test_wrong_arguments_of_phase_2():
    (out,), (lse,) = F.inter_block(SOURCES, [QUERY])
    with pytest.raises(ValueError, match="needs num_sources"):
        F.merge(out, lse, SOURCES[0], QUERY, output="sum")
    with pytest.raises(ValueError, match=r"lse has shape \(2,\)"):
        F.merge(out, lse[:, 0], SOURCES[0], QUERY)
    with pytest.raises(ValueError, match="inter_out has dtype torch.float32, partial has torch.float64"):
        F.merge(out.float(), lse, SOURCES[0], QUERY)
    with pytest.raises(ValueError, match="update has shape"):
        F.add_merge_norm(SOURCES[0], SOURCES[0][0], out, lse, QUERY, None, None, None, 1e-6)
    with pytest.raises(ValueError, match="norm_bias is given with norm='rms'"):
        F.add_merge_norm(SOURCES[0], None, out, lse, QUERY, None, GAIN, GAIN, 1e-6)
    with pytest.raises(ValueError, match="norm='batch'"):
        F.add_merge_norm(SOURCES[0], None, out, lse, QUERY, None, GAIN, None, 1e-6, norm="batch")


VARIANTS = [{"num_heads": 4}, {"key_rank": 3}, {"recency_bias": 1.5}, {"num_heads": 2, "recency_bias": -1.0}, {}]


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_give_the_mix_their_weights_give(variant):
    rank = variant.get("key_rank")
    query, gain = QUERY[:rank], GAIN[:rank]
    mix, weights = F.attn_res_read(SOURCES, query, gain, return_weights=True, **variant)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    heads = variant.get("num_heads", 1)
    assert weights.shape == ((2, 3, heads, 3) if heads > 1 else (2, 3, 3))
    by_head = torch.stack(SOURCES, -1).unflatten(-2, (heads, -1))
    expected = (by_head * weights.reshape(2, 3, heads, 1, 3)).sum(-1).flatten(-2)
    torch.testing.assert_close(mix, expected)
    torch.testing.assert_close(F.attn_res_read(SOURCES, query, gain, output="sum", **variant), 3 * expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gate_adds_the_mix_to_the_sum(variant):
    rank, gate = variant.get("key_rank"), torch.linspace(-1, 1, 8, dtype=torch.float64)
    query = QUERY[:rank]
    mix = F.attn_res_read(SOURCES, query, **variant)
    found, weights = F.attn_res_read(SOURCES, query, gate=gate, return_weights=True, **variant)
    torch.testing.assert_close(found, torch.stack(SOURCES).sum(0) + gate * mix)
    assert not weights.requires_grad
    closed = F.attn_res_read(SOURCES, query, gate=torch.zeros(8), **variant)
    torch.testing.assert_close(closed, torch.stack(SOURCES).sum(0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_heads": 3}, ValueError, "num_heads=3 does not divide the 8 channels of the sources"),
        ({"num_heads": 0}, ValueError, "num_heads=0 must be at least 1"),
        ({"key_rank": 9}, ValueError, "key_rank=9 is more than the 8 channels of the sources"),
        ({"key_rank": 4}, ValueError, r"query has shape \(8,\); key_rank=4 needs \(4,\)"),
        ({"key_rank": 4, "query": QUERY[:4], "key_norm": GAIN}, ValueError, r"key_norm has shape \(8,\)"),
        ({"key_rank": 4, "num_heads": 2}, ValueError, "contradict"),
        ({"recency_bias": float("inf")}, ValueError, "must be finite"),
        ({"gate": torch.zeros(1)}, ValueError, r"gate has shape \(1,\); the sources have 8 channels"),
        ({"gate": 0.5}, TypeError, "gate must be a floating-point tensor, not float"),
        ({"gate": GAIN, "output": "sum"}, ValueError, "gate is given with output='sum'"),
    ],
)
def test_wrong_arguments_of_a_variant(change, error, message):
    with pytest.raises(error, match=message):
        F.attn_res_read(**{"sources": SOURCES, "query": QUERY} | change)


# Once an empty result, a wrong one, or an error that named no argument
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, q, o, e: F.inter_block(s, iter([q, q])), "queries must be a list or tuple of tensors"),
        (lambda s, q, o, e: F.inter_block(s, torch.stack([q])), "queries must be a list or tuple of tensors"),
        (lambda s, q, o, e: F.inter_block(s, [q], iter([q])), "key_norms must be a list or tuple of tensors"),
        (lambda s, q, o, e: F.merge(o, None, s[0], q), "lse must be a floating-point tensor, not NoneType"),
        (
            lambda s, q, o, e: F.merge(o, e.long(), s[0], q),
            "lse must be a floating-point tensor, not a torch.int",
        ),
        (lambda s, q, o, e: F.merge([o], e, s[0], q), "inter_out must be a floating-point tensor, not list"),
        (
            lambda s, q, o, e: F.merge(o, e, s[0], q, None, 1e-6, "sum", 2.5),
            "num_sources=2.5 must be an integer",
        ),
        (lambda s, q, o, e: F.attn_res_read(s, q, eps="x"), "eps='x' must be a number"),
        (
            lambda s, q, o, e: F.add_merge_norm(s[0], [s[1]], o, e, q, None, None, None, 1e-6),
            "update must be a floating-point tensor, not list",
        ),
        (
            lambda s, q, o, e: F.add_merge_norm(s[0], None, o, e, q, None, None, None, None),
            "norm_eps=None must be a number",
        ),
    ],
)
def test_arguments_of_another_kind_are_named(call, message):
    sources, query = [torch.randn(2, 8) for _ in range(3)], torch.randn(8)
    (out,), (lse,) = F.inter_block(sources, [query])
    with pytest.raises(TypeError, match=re.escape(message)):
        call(sources, query, out, lse)


# Once the source itself, where it was compiled
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_mix_of_one_source_is_not_that_source(backend):
    def doubled(source, query):
        outs, _ = F.inter_block([source], [query, query])
        outs[0].mul_(2.0)
        return outs[1]

    source, query = torch.randn(2, 8), torch.randn(8)
    before = source.clone()
    other = torch.compile(doubled, backend=backend, fullgraph=True)(source, query)
    assert torch.equal(source, before)
    torch.testing.assert_close(other, before)
