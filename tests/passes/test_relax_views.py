"""Mirrors attnres_rewrite/passes/relax_views.py: views of what is laid out in another way."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnres_rewrite as ar
from tests.networks import Layer, gpt_of, ids


def sequence_first(s: Layer, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    x = x + s.f(s.n1(x))
    flat = x.transpose(0, 1).contiguous().view(length * batch, width)
    flat = flat + s.g(s.n2(flat))
    return flat.view(length, batch, width).permute(1, 0, 2)


@pytest.mark.parametrize("num_blocks", [1, "full"])
def test_a_state_that_is_permuted_in_memory_can_be_viewed_by_its_readers(num_blocks):
    model = gpt_of(sequence_first, depth=3)
    new = ar.rewrite(model, (ids(),), config=ar.AttnResConfig(num_blocks=num_blocks))
    assert [stream.num_updates for stream in new.report.streams] == [6]
    for size in ((2, 5), (3, 7)):
        torch.testing.assert_close(new(ids(*size)), model(ids(*size)))


def test_a_view_that_is_written_into_stays_a_view():
    def counted(s: Layer, x: Tensor) -> Tensor:
        x = sequence_first(s, x)
        noted = x * 1
        noted.transpose(0, 1).view(-1)[:1] = 0
        return x + s.f(s.n1(noted))

    model = gpt_of(counted, depth=2)
    new = ar.rewrite(model, (ids(),), dynamic_shapes={}, verify=False)
    original = new.programs[False].original
    kept = [
        node for node in original.nodes if node.target is torch.ops.aten.view.default and node.meta["val"].dim() == 1
    ]
    assert len(kept) == 2


def test_attention_may_have_another_layout_than_where_it_was_captured():
    def by_hand(s: Layer, x: Tensor) -> Tensor:
        heads = s.n1(x).unflatten(-1, (2, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return x + s.f(mixed.transpose(1, 2).contiguous().view(x.shape))

    model = gpt_of(by_hand, depth=2)
    new = ar.rewrite(model, (ids(),))
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(new(ids()), model(ids()))
    assert new.to("meta")(ids().to("meta")).is_meta


def test_a_view_that_a_body_writes_into_stays_a_view():
    def counted(s: Layer, x: Tensor) -> Tensor:
        seen = torch.zeros(x.shape)
        with torch.no_grad():
            seen.view(-1).add_(1)
        return x + s.f(s.n1(x) * seen)

    model = gpt_of(counted, depth=2)
    new = ar.rewrite(model, (ids(),))
    torch.testing.assert_close(new(ids()), model(ids()))
