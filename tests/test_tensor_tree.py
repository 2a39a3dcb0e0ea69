"""Tensors leave a tree once, and come back under every name they had."""

import torch
from torch import nn

from attnres_rewrite.tensor_tree import add_tensors, holder_of, tensors_of


def tree() -> nn.Module:
    root = nn.Module()
    root.a = nn.Linear(3, 2, bias=False)
    root.b = nn.Module()
    root.b.tied = root.a.weight
    root.b.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    root.b.register_buffer("kept", torch.arange(3))
    root.b.register_buffer("dropped", torch.zeros(()), persistent=False)
    root.b.constant = torch.full((2,), 7.0)
    root.b.register_buffer("none", None)
    return root


def test_a_tied_tensor_is_stored_once_and_tied_again():
    before = tree()
    stored, table = tensors_of(before)
    assert stored.keys() == {"a.weight", "b.frozen", "b.kept", "b.dropped", "b.constant"}
    assert table["b.tied"]["stored_as"] == "a.weight"
    after = nn.Module()
    add_tensors(after, table, stored)
    assert after.b.tied is after.a.weight
    assert after.state_dict().keys() == before.state_dict().keys() == {"a.weight", "b.tied", "b.frozen", "b.kept"}
    assert [name for name, _ in after.named_buffers()] == ["b.kept", "b.dropped"]
    assert not after.b.frozen.requires_grad
    assert after.a.weight.requires_grad
    assert torch.equal(after.b.constant, before.b.constant)
    assert not isinstance(after.b.constant, nn.Parameter)


def test_what_is_stored_is_a_copy():
    before = tree()
    stored, _ = tensors_of(before)
    wanted = stored["a.weight"].clone()
    with torch.no_grad():
        before.a.weight.zero_()
    assert torch.equal(stored["a.weight"], wanted)


def test_a_holder_is_made_where_it_is_missing():
    root = nn.Module()
    assert holder_of(root, "") is root
    inner = holder_of(root, "layers.0.mlp")
    assert holder_of(root, "layers.0.mlp") is inner is root.layers.get_submodule("0").mlp
