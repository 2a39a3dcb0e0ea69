import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnres_rewrite as ar
from tests.networks import VOCAB, WIDTH, Gpt

CONFIG = ar.AttnResConfig(num_blocks=3)
QUICK = {"backend": "attnres", "options": {"backend": "aot_eager"}, "fullgraph": True}
ids = torch.arange(16).reshape(2, 8) % VOCAB


class Wrapped(nn.Module):
    """A trunk and a head, as the models of transformers are made; its layers may be checkpointed."""

    def __init__(self, checkpoints: bool = False):
        super().__init__()
        self.trunk = Gpt()
        self.head = nn.Linear(VOCAB, 3)
        self.checkpoints = checkpoints

    def forward(self, ids):
        trunk = checkpoint(self.trunk, ids, use_reentrant=False) if self.checkpoints else self.trunk(ids)
        return self.head(trunk)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


@pytest.fixture
def attached():
    torch.manual_seed(0)
    model = Wrapped()
    ar.attach(model, CONFIG, (ids,))
    return model


def twin_of(attached):
    twin = Wrapped()
    twin.load_state_dict(attached.state_dict(), strict=False)
    return twin


def hooked(model):
    return [name for name, part in model.named_modules() if part._forward_pre_hooks]


def test_the_parts_with_reads_raise_and_no_others(attached):
    with pytest.raises(ar.NotCompiledError, match="a part of an attached model is called by itself"):
        attached.trunk(ids)
    with pytest.raises(ar.NotCompiledError, match="a part"):
        attached.trunk.layers[1](torch.randn(2, 8, WIDTH))
    assert attached.trunk.embed(ids).shape[:2] == (2, 8)
    assert attached.head(torch.randn(2, VOCAB)).shape == (2, 3)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "attnres"])
def test_a_compiled_part_raises(attached, backend):
    with pytest.raises(Exception, match="a part of an attached model"):
        torch.compile(attached.trunk, backend=backend)(ids)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="a part of an attached model"):
        torch.compile(lambda: attached.trunk(ids) + 1, backend=backend, fullgraph=True)()


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_whole_model_runs_through_them(checkpoints):
    model = Wrapped(checkpoints).double()
    twin = Wrapped().double()
    twin.load_state_dict(model.state_dict())
    ar.attach(model, CONFIG, (ids,))
    model.compile(**QUICK)
    loss = model(ids).square().sum()
    loss.backward()
    twin_loss = twin(ids).square().sum()
    twin_loss.backward()
    torch.testing.assert_close(loss, twin_loss)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


def test_inside_original_parts_run_compiled_or_not(attached):
    expected = twin_of(attached)
    compiled = torch.compile(attached.trunk, backend="aot_eager", fullgraph=True)
    attached.compile(**QUICK)
    with ar.original(attached):
        torch.testing.assert_close(attached.trunk(ids), expected.trunk(ids))
        torch.testing.assert_close(compiled(ids), expected.trunk(ids))
        torch.testing.assert_close(attached(ids), expected(ids))
    with pytest.raises(ar.NotCompiledError, match="a part"):
        compiled(ids)


# Once wrong: what was compiled inside was run outside, without its reads and without a word
@pytest.mark.parametrize("backend", ["aot_eager", "attnres"])
def test_a_part_compiled_inside_original_raises_outside(attached, backend):
    compiled = torch.compile(attached.trunk, backend=backend)
    with ar.original(attached):
        compiled(ids)
    with pytest.raises(Exception, match="a part of an attached model"):
        compiled(ids)


# Once wrong: one model inside original() let the parts of all run
def test_original_holds_for_its_own_model(attached):
    other = copy.deepcopy(attached)
    with ar.original(attached):
        with pytest.raises(ar.NotCompiledError, match="a part"):
            other.trunk(ids)
        with pytest.raises(Exception, match="a part of an attached model"):
            torch.compile(other.trunk, backend="attnres")(ids)
        twins = (copy.deepcopy(attached), pickle.loads(pickle.dumps(attached)))
    for twin in twins:
        with pytest.raises(ar.NotCompiledError, match="a part"):
            twin.trunk(ids)


def test_exports_and_graphs_of_a_part_raise(attached):
    with pytest.raises(ar.NotCompiledError, match="a part"):
        torch.export.export(attached.trunk, (ids,))
    with pytest.raises(ar.NotCompiledError, match="a part"):
        torch.fx.symbolic_trace(attached.trunk)
    with pytest.raises(ar.AlreadyRewrittenError):
        ar.rewrite(attached.trunk, (ids,))


def test_copies_are_guarded_and_detach_lets_go(attached):
    for twin in (copy.deepcopy(attached), pickle.loads(pickle.dumps(attached))):
        with pytest.raises(ar.NotCompiledError, match="a part"):
            twin.trunk(ids)
        ar.detach(twin)
        assert hooked(twin) == []
        twin.trunk(ids)
    assert hooked(attached)


def test_hooks_of_others_stay(attached):
    seen = []
    attached.trunk.register_forward_pre_hook(lambda module, args: seen.append(args))
    ar.detach(attached)
    attached.trunk(ids)
    assert len(seen) == 1


def test_a_refused_attach_leaves_no_hooks(monkeypatch):
    model = Wrapped()
    monkeypatch.setattr("attnres_rewrite.attachment.load_saved_reads", lambda *_: 1 / 0)
    monkeypatch.setattr("attnres_rewrite.attachment.folder_with_queries", lambda _: "folder")
    with pytest.raises(ZeroDivisionError):
        ar.attach(model, CONFIG, (ids,))
    assert hooked(model) == []


def test_the_rewrite_of_an_attached_model_has_no_marks(attached):
    new = ar.as_rewritten(attached, (ids,))
    assert not any("part" in str(node.target) for node in new.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(new(ids), twin_of(attached)(ids))
