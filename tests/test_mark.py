import pytest
import torch
from torch import nn

import attnres_rewrite as ar
from attnres_rewrite.mark import AttachedRead, AttachedStream, Attachment, mark_inputs

READS = (AttachedRead(1, "layers.0.attn_res.0", ("layers.0", "first")), AttachedRead(4, "attn_res.0", ("",)))
STREAM = AttachedStream("stream", 16, 4, (2, 4), READS)


@pytest.mark.parametrize(
    "config",
    [
        ar.AttnResConfig(num_blocks="full"),
        ar.AttnResConfig(block_size=2, output="mean", key_norm=False, param_dtype=torch.bfloat16, eps=1e-5),
        ar.AttnResConfig(key_rank=3, gate=True, recency_bias=1.5),
    ],
)
def test_an_attachment_survives_as_text(config):
    attachment = Attachment(config, (STREAM, STREAM))
    assert Attachment.from_json(attachment.to_json()) == attachment


def test_parameters_are_named_query_first_and_gain_only_where_there_is_one():
    with_gain = Attachment(ar.AttnResConfig(), (STREAM,))
    assert with_gain.parameter_names == (
        "layers.0.attn_res.0.query",
        "layers.0.attn_res.0.key_norm",
        "attn_res.0.query",
        "attn_res.0.key_norm",
    )
    without = Attachment(ar.AttnResConfig(key_norm=False), (STREAM,))
    assert without.parameter_names == ("layers.0.attn_res.0.query", "attn_res.0.query")


def test_a_mark_raises_wherever_it_runs():
    query = nn.Parameter(torch.zeros(4))
    with pytest.raises(ar.NotCompiledError, match=r'model\.compile\(backend="attnres"\)'):
        mark_inputs([query], "{}", (torch.ones(2),), {})


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "aot_eager_decomp_partition", "inductor"])
@pytest.mark.parametrize("form", ["argument", "nested", "unused", "none"])
def test_no_backend_can_drop_it(backend, form):
    torch._dynamo.reset()
    query, weight = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(3))

    def call(x=None, nested=None):
        (x, nested), _ = mark_inputs([query], "{}", (x, nested), {})
        used = nested["x"] if form in ("nested", "unused") else x if form == "argument" else weight
        return used * 3

    x, nested = torch.ones(3), {"x": torch.ones(3)}
    args = {"argument": (x,), "nested": (None, nested), "unused": (x, nested), "none": ()}[form]
    compiled = torch.compile(call, backend=backend)
    with pytest.raises(ar.NotCompiledError):
        compiled(*args)
    # with a gradient asked for, too
    x.requires_grad_(True)
    nested["x"].requires_grad_(True)
    with pytest.raises(ar.NotCompiledError):
        compiled(*args)


def test_only_tensors_are_marked():
    query = nn.Parameter(torch.zeros(4))
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm)
        return gm.forward

    def call(x, flag, y=None):
        (x, flag), named = mark_inputs([query], "{}", (x, flag), {"y": y})
        return x + named["y"] if flag else x

    with pytest.raises(ar.NotCompiledError):
        torch.compile(call, backend=keep)(torch.ones(3), True, y=torch.ones(3))
    ops = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert ops.count(torch.ops.attnres.mark) == 1
    assert ops.count(torch.ops.attnres.marked) == 2


def test_the_ops_are_registered_well():
    value, token = torch.randn(3, 4, requires_grad=True), torch.zeros((), dtype=torch.int64)
    torch.library.opcheck(torch.ops.attnres.marked, (value, token))
