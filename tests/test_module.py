"""Mirrors attnres_rewrite/module.py: one module, two modes, and everything a user does with it."""

import copy
import pickle

import pytest
import torch

import attnres_rewrite as ar
from tests.networks import gpt, ids


@pytest.fixture
def pair():
    model = gpt(dropout=0.3)
    return model, ar.rewrite(model, (ids(),), verify=False)


def test_modes_switch_as_the_original_does(pair):
    model, new = pair
    assert not new.training
    torch.testing.assert_close(new(ids()), model(ids()))
    assert new.train() is new
    model.train()
    torch.manual_seed(1)
    expected = model(ids())
    torch.manual_seed(1)
    torch.testing.assert_close(new(ids()), expected)
    new.eval()
    model.eval()
    torch.testing.assert_close(new(ids()), model(ids()))
    assert not any(module.training for module in new.modules())


def test_a_rewrite_trains_and_every_query_gets_a_gradient(pair):
    _, new = pair
    new.train()
    optimizer = torch.optim.AdamW(new.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(new(ids()).flatten(0, 1), ids().flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in new.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(value.abs().sum() > 0 for name, value in new.named_parameters() if name.endswith("query"))


def test_a_deep_copy_is_apart_and_keeps_its_ties(pair):
    _, new = pair
    twin = copy.deepcopy(new)
    torch.testing.assert_close(twin(ids()), new(ids()))
    assert twin.head.weight is twin.embed.weight
    assert twin.embed.weight is not new.embed.weight
    twin.train()
    assert not new.training
    assert twin.report is new.report


def test_a_state_dict_goes_round(pair):
    _, new = pair
    state = {name: value + 1 for name, value in new.state_dict().items()}
    new.load_state_dict(state)
    assert all(torch.equal(new.state_dict()[name], value) for name, value in state.items())


def test_the_state_dict_of_the_original_loads(pair):
    model, new = pair
    missing, unexpected = new.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all("attn_res" in name for name in missing)


def test_it_moves_to_float64(pair):
    _, new = pair
    assert new.double()(ids()).dtype == torch.float64


def test_pickle_is_refused_with_the_way_to_save(pair):
    with pytest.raises(TypeError, match="attnres_rewrite.save"):
        pickle.dumps(pair[1])


def test_inductor_compiles_forward_and_backward_of_both_modes():
    model = gpt(depth=2, dropout=0.5)
    new = ar.rewrite(model, (ids(),), config=ar.AttnResConfig(block_size=2), verify=False)
    compiled = torch.compile(new, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids()), model(ids()), rtol=1e-4, atol=1e-5)
    new.train()
    trained = compiled(ids())
    assert not torch.allclose(trained, model(ids()), atol=1e-2)  # dropout is on
    trained.square().mean().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())
    new.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids()), model(ids()), rtol=1e-4, atol=1e-5)


def test_a_shallow_copy_switches_modes_and_shares_parameters() -> None:
    model = ar.rewrite(gpt(dropout=0.5), (ids(),), verify=False)
    twin = copy.copy(model)
    assert twin.head.weight is model.head.weight
    assert torch.equal(twin.eval()(ids()), model.eval()(ids()))
    assert not torch.equal(twin.train()(ids()), model(ids()))
