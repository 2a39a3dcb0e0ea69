import operator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attnres_rewrite as ar
from attnres_rewrite.training_ir import to_dynamo, to_training_ir

aten = torch.ops.aten


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x):
        h = nn.functional.dropout(self.linear(x), 0.5, self.training) + self.offset
        h += x
        return h.relu()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        # not the derivative, so that a lost backward shows
        return gradient * 5


def dynamo_graph(model, *args, **options):
    """Return Dynamo's graph of a call, with its inputs."""
    found = []

    def keep(gm, inputs):
        found.append((gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=keep, fullgraph=True, **options)(*args)
    (graph,) = found
    return graph


def ops(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_calls_become_aten_and_parameters_get_attr():
    gm, _ = dynamo_graph(Small(), torch.randn(2, 4))
    traced = to_training_ir(gm, {})
    assert ops(traced.module.graph) == [
        aten.linear.default,
        aten.dropout.default,
        aten.add.Tensor,
        aten.add_.Tensor,
        aten.relu.default,
    ]
    assert len(list(traced.module.graph.find_nodes(op="get_attr"))) == 3
    used = [node for node in traced.inputs if node.users]
    assert len(used) == 1
    assert len(traced.inputs) == 4


def test_nodes_keep_their_values_and_places():
    gm, _ = dynamo_graph(Small(), torch.randn(2, 4))
    (linear,) = to_training_ir(gm, {}).module.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert tuple(linear.meta["val"].shape) == (2, 4)
    assert "self.linear(x)" in linear.meta["stack_trace"]
    assert "nn_module_stack" in linear.meta


def test_the_way_back_keeps_the_calling_convention():
    model, x = Small().eval(), torch.randn(2, 4)
    gm, inputs = dynamo_graph(model, x)
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    sources = [node._dynamo_source for node in gm.graph.find_nodes(op="placeholder")]
    to_dynamo(to_training_ir(gm, {}), gm)
    gm.recompile()
    again = list(gm.graph.find_nodes(op="placeholder"))
    assert len(again) == len(names)
    assert [node._dynamo_source for node in again] == sources
    torch.testing.assert_close(gm(*inputs)[0], model(x))
    assert not list(gm.graph.find_nodes(op="get_attr"))
    assert all("val" not in node.meta for node in gm.graph.nodes if node.op == "call_function")


def test_dynamic_sizes_keep_their_symbols():
    gm, _ = dynamo_graph(Small(), torch.randn(3, 4), dynamic=True)
    traced = to_training_ir(gm, {})
    (relu,) = traced.module.graph.find_nodes(op="call_function", target=aten.relu.default)
    assert isinstance(relu.meta["val"].shape[0], torch.SymInt)


# Dynamo makes an instance of it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_an_autograd_function_keeps_its_backward():
    model, x = Small().eval(), torch.randn(2, 4, requires_grad=True)
    gm, inputs = dynamo_graph(lambda x: Doubled.apply(model(x)).sum(), x)
    to_dynamo(to_training_ir(gm, {}), gm)
    compiled = torch._dynamo.lookup_backend("aot_eager")(gm, list(inputs))
    compiled(*inputs)[0].backward()
    found, x.grad = x.grad, None
    Doubled.apply(model(x)).sum().backward()
    torch.testing.assert_close(found, x.grad)


def by_vmap(x):
    return torch.vmap(lambda row: row.cumsum(0) * row.sum())(x)


def by_vmap_of_vmap(x):
    return torch.vmap(torch.vmap(lambda one, other: one * other, in_dims=(0, None)))(x, x.sum(1))


def by_grad(x):
    return torch.func.grad(lambda y: (y**3).sum() + y.exp().sum())(x)


@pytest.mark.parametrize("transformed", [by_vmap, by_vmap_of_vmap, by_grad])
def test_what_is_under_a_function_transform_stays_as_it_is(transformed):
    model, x = Small().eval(), torch.randn(2, 4, requires_grad=True)

    def network(x):
        return (model(transformed(model(x))) * transformed(x)).sum()

    gm, inputs = dynamo_graph(network, x)
    to_dynamo(to_training_ir(gm, {}), gm)
    compiled = torch._dynamo.lookup_backend("aot_eager")(gm, list(inputs))
    (found,) = torch.autograd.grad(compiled(*inputs)[0], x)
    (wanted,) = torch.autograd.grad(network(x), x)
    torch.testing.assert_close(found, wanted)


def test_an_activation_checkpoint_is_opened_and_tagged():
    model, x = Small().eval(), torch.randn(2, 4)
    gm, _ = dynamo_graph(lambda x: checkpoint(model, checkpoint(model, x, use_reentrant=False), use_reentrant=False), x)
    traced = to_training_ir(gm, {})
    tagged = [node for node in traced.module.graph.nodes if node.op == "call_function" and "recompute" in node.meta]
    assert [node.target for node in tagged if node.target is not operator.getitem] == ops(traced.module.graph)
    assert {node.meta["recompute"] for node in tagged} == {CheckpointPolicy.PREFER_RECOMPUTE}
    # two of them, kept apart
    assert len({node.meta["ac_graph_id"] for node in tagged}) == 2
    to_dynamo(traced, gm)
    assert sum("recompute" in node.meta for node in gm.graph.nodes) == len(tagged)


def test_a_selective_checkpoint_is_refused():
    def contexts():
        return create_selective_checkpoint_contexts([aten.mm.default])

    model, x = Small().eval(), torch.randn(2, 4)
    gm, _ = dynamo_graph(lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts), x)
    with pytest.raises(ar.CaptureError, match="context_fn"):
        to_training_ir(gm, {})
