"""Mirrors attnres_rewrite/passes/insert_reads.py."""

import pytest
import torch
from torch import Tensor, fx, nn

import attnres_rewrite as ar
from attnres_rewrite.kernels.read.op import block_attn_res
from attnres_rewrite.kernels.variant_read.op import variant_attn_res
from attnres_rewrite.module import RewrittenModule
from tests.networks import WIDTH, Gpt, Layer, Mlp, exported_gpt, gpt, gpt_of, ids


def rewrite(model: nn.Module, *args: Tensor, **config: object) -> RewrittenModule:
    return ar.rewrite(model, args or (ids(),), config=ar.AttnResConfig(schedule="direct", **config))


def stream_text(graph: fx.Graph) -> str:
    """Print the reads and the adds of their sources, with short names."""
    shown = [
        n for n in graph.nodes if n.target is block_attn_res or (n.target is torch.ops.aten.add.Tensor and feeds(n))
    ]
    names = {node: f"s{i}" for i, node in enumerate(shown)}

    def show(arg: fx.Node) -> str:
        return names.get(arg, arg.name)

    lines = []
    for node in shown:
        if node.target is block_attn_res:
            sources, query = node.args
            lines.append(f"{names[node]} = read([{', '.join(map(show, sources))}], {query.target})")
        else:
            lines.append(f"{names[node]} = {show(node.args[0])} + {show(node.args[1])}")
    return "\n".join(lines)


def feeds(node: fx.Node) -> bool:
    return any(user.target is block_attn_res for user in node.users) or any(
        user.target is torch.ops.aten.add.Tensor and feeds(user) for user in node.users
    )


def test_the_states_become_reads_of_blocks():
    new = rewrite(gpt_of(lambda s, x: x + s.f(s.n1(x)), depth=4), block_size=2)
    assert stream_text(new.graph) == (
        "s0 = read([embedding, type_as_default], layers.1.attn_res.0.query)\n"
        "s1 = type_as_default + linear_3\n"
        "s2 = read([embedding, s1], layers.2.attn_res.0.query)\n"
        "s3 = read([embedding, s1, type_as_default_1], layers.3.attn_res.0.query)\n"
        "s4 = type_as_default_1 + linear_7\n"
        "s5 = read([embedding, s1, s4], attn_res.0.query)"
    )


def test_new_parameters_are_vectors_beside_the_old_keys():
    model = gpt()
    new = rewrite(model, num_blocks=2)
    old, keys = model.state_dict(), new.state_dict()
    assert keys.keys() > old.keys()
    added = {name: value for name, value in keys.items() if name not in old}
    assert len(added) == 12
    assert {tuple(value.shape) for value in added.values()} == {(WIDTH,)}
    assert all(not value.any() if name.endswith("query") else (value == 1).all() for name, value in added.items())
    assert new.report.num_parameters_added == 12 * WIDTH


def test_without_key_norm_only_queries_are_added():
    new = rewrite(gpt(depth=2), key_norm=False)
    assert {name.rpartition(".")[2] for name, _ in new.named_parameters() if "attn_res" in name} == {"query"}


def test_provenance_stays_in_the_metadata():
    new = rewrite(gpt(depth=2))
    reads = [node for node in new.graph.nodes if node.target is block_attn_res]
    assert [node.meta["attn_res"] for node in reads] == [
        read.query_name.removesuffix(".query") for read in new.report.reads
    ]
    for node in reads:
        assert "networks.py" in node.meta["stack_trace"]
        assert node.meta["val"].shape[-1] == WIDTH
        assert "nn_module_stack" in node.meta


def in_place(s: Layer, x: Tensor) -> Tensor:
    x += s.f(s.n1(x))
    x += s.g(s.n2(x))
    return x


class Collecting(Gpt):
    """Returns its hidden states too."""

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.embed(ids) * 3.0
        seen = [x]
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return self.head(self.norm(x)), seen


class ScaledStream(nn.Module):
    """A stream scaled by a buffer in every layer, in two layouts, with a channel gain."""

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(Mlp() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("scale", torch.tensor([0.8]))
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for mlp in self.mlps:
            x = x + mlp(self.norm(x))
            x = (x * self.scale).transpose(0, 1) * self.gain
        return self.norm(x)


CASES = {
    "in place": (lambda: gpt_of(in_place), None),
    "parallel": (lambda: gpt_of(lambda s, x: x + s.f(s.n1(x)) + s.g(s.n2(x))), None),
    "u-net": (lambda: gpt_of(lambda s, x: (x + s.f(s.n1(x))) + s.g(s.n2(x)) + x), None),
    "added to itself": (lambda: gpt_of(lambda s, x: (y := x + s.f(s.n1(x))) + y), None),
    "broadcast injection": (
        lambda: gpt_of(lambda s, x: (y := x + s.f(s.n1(x))) + s.gain + s.g(s.n2(y))),
        None,
    ),
    "hidden states": (lambda: Collecting(depth=2).eval(), None),
    "carriers": (
        lambda: ScaledStream().eval(),
        torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)),
    ),
    "nested": (lambda: gpt_of(lambda s, x: x + ((y := s.n1(x)) + s.f(y))), None),
}


@pytest.mark.parametrize("blocks", [1, 2, "full"])
@pytest.mark.parametrize("name", CASES)
def test_every_shape_of_stream_is_rewritten_and_proven(name, blocks):
    build, given = CASES[name]
    torch.manual_seed(0)
    new = rewrite(build(), given if given is not None else ids(), num_blocks=blocks)
    assert new.report.verify.passed
    new.graph.lint()


class ChannelsFirst(nn.Module):
    """Channels on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, 8) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(norm(x))
        return self.norms[0](x)


def test_channels_that_are_not_last_are_moved_there_for_the_read():
    torch.manual_seed(0)
    new = rewrite(ChannelsFirst().eval(), torch.randn(2, 8, 4, 4), block_size=2)
    read = next(node for node in new.graph.nodes if node.target is block_attn_res)
    assert {source.target for source in read.args[0]} == {torch.ops.aten.movedim.int}
    assert new.report.streams[0].width == 8
    assert new.report.verify.passed


def test_a_second_rewrite_is_refused():
    new = rewrite(gpt(depth=2))
    with pytest.raises(ar.AlreadyRewrittenError, match=r"rewritten already, at layers.0.attn_res.0.query"):
        rewrite(new)


def test_a_name_that_is_taken_is_refused():
    model = gpt(depth=2)
    model.layers[1].attn_res = nn.Linear(WIDTH, WIDTH)
    forward = model.layers[1].forward
    model.layers[1].forward = lambda x: forward(x) + 0 * model.layers[1].attn_res(x)
    with pytest.raises(ar.RewriteError, match="attn_res"):
        rewrite(model)


def test_under_autocast_every_source_keeps_the_precision_of_the_stream():
    model = gpt()
    new = ar.rewrite(model, (ids(),), config=ar.AttnResConfig(block_size=2, schedule="direct"), verify=False)
    seen: list[torch.dtype] = []

    class Watch(fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is block_attn_res:
                seen.extend(source.dtype for source in args[0])
            return super().call_function(target, args, kwargs)

    with torch.autocast("cpu", torch.bfloat16):
        out = Watch(new).run(ids())
        torch.testing.assert_close(out, model(ids()), rtol=0.02, atol=0.02)
    assert set(seen) == {torch.float32}


def test_variants_have_parameters_of_their_own_sizes():
    config = ar.AttnResConfig(key_rank=5, gate=True)
    new = ar.rewrite(exported_gpt(), (ids(),), config=config, verify=False)
    sizes = {name.rpartition(".")[2]: tuple(p.shape) for name, p in new.named_parameters() if "attn_res" in name}
    assert sizes == {"query": (5,), "key_norm": (5,), "gate": (WIDTH,)}
    gates = [parameter for name, parameter in new.named_parameters() if name.endswith(".gate")]
    assert len(gates) == len(new.report.reads)
    assert not any(gate.any() for gate in gates)
    assert new.report.num_parameters_added == len(gates) * (5 + 5 + WIDTH)


def test_a_gated_read_is_added_to_the_running_sum():
    config = ar.AttnResConfig(block_size=2, gate=True, schedule="direct")
    model = gpt_of(lambda s, x: x + s.f(s.n1(x)), depth=3)
    new = ar.rewrite(model, (ids(),), config=config, verify=False, dynamic_shapes={})
    reads = [node for node in new.graph.nodes if node.target is block_attn_res]
    shown = []
    for read in reads:
        assert read.kwargs["output"] == "mean"
        (gated,) = read.users
        (total,) = gated.users
        shown.append(f"{total} = {total.args[0]} + {gated.args[1].target} * read{read.args[0]}")
    assert shown == [
        "add_tensor_1 = add_tensor + layers.1.attn_res.0.gate * read[embedding, type_as_default]",
        "add_tensor_4 = add_tensor_3 + layers.2.attn_res.0.gate * read[embedding, add_tensor_2]",
        "add_tensor_6 = add_tensor_5 + attn_res.0.gate * read[embedding, add_tensor_2, type_as_default_1]",
    ]
    totals = [next(iter(next(iter(read.users)).users)).args[0] for read in reads]
    assert [str(total.args[0]) for total in totals] == ["embedding", *map(str, totals[:-1])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_at_zero_gates_any_query_gives_the_original_bit_for_bit(dtype):
    model = gpt().to(dtype)
    new = ar.rewrite(model, (ids(),), config=ar.AttnResConfig(gate=True, num_heads=2), verify=False, dynamic_shapes={})
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if name.endswith((".query", ".key_norm")):
                parameter.normal_()
    assert torch.equal(new(ids()), model(ids()))


def test_only_a_variant_of_the_read_itself_is_another_node():
    def targets(**config: object) -> set[object]:
        new = ar.rewrite(exported_gpt(), (ids(),), config=ar.AttnResConfig(**config), verify=False)
        return {node.target for node in new.graph.nodes} & {block_attn_res, variant_attn_res}

    assert targets(schedule="direct", gate=True) == {block_attn_res}
    assert targets(schedule="direct", recency_bias=1.0) == {variant_attn_res}
    assert targets(num_heads=2) == targets(key_rank=3) == {variant_attn_res}


def test_through_norms_a_gate_learns_from_zero_queries_and_only_because_it_is_a_vector():
    """Norms do not see the length of what they read, so the channels of a gate's gradient add up to nothing."""
    new = ar.rewrite(exported_gpt(), (ids(),), config=ar.AttnResConfig(gate=True), verify=False).double()
    new(ids()).square().mean().backward()
    for name, parameter in new.named_parameters():
        if name.endswith(".query"):
            assert not parameter.grad.any()
        if name.endswith(".gate"):
            assert abs(parameter.grad.sum()) < 1e-3 * parameter.grad.abs().sum()
            assert parameter.grad.abs().max() > 1e-6


class Forked(Gpt):
    """One trunk, and two stacks of layers that go on from it; `layers` has three."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        trunk = self.layers[0](self.embed(ids))
        left, right = self.layers[1](trunk), self.layers[2](trunk)
        return self.head(self.norm(left)), self.head(self.norm(right))


@pytest.mark.parametrize("schedule", ["direct", "two_phase"])
def test_a_stream_may_start_at_a_state_of_another(schedule):
    torch.manual_seed(0)
    config = ar.AttnResConfig(num_blocks="full", schedule=schedule)
    new = ar.rewrite(Forked().eval(), (ids(),), config=config, dynamic_shapes={})
    assert [[read.num_sources for read in stream.reads] for stream in new.report.streams] == [[2, 3, 4, 5], [2, 3]]
    assert new.report.verify.passed


def laid_out_between(s: Layer, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    x = x + s.f(s.n1(x))
    x = x.transpose(0, 1).contiguous().view(length * batch, width)
    x = x + s.g(s.n2(x))
    return x.view(length, batch, width).transpose(0, 1).contiguous()


def test_a_view_of_a_laid_out_stream_is_made_of_sources_that_are_not():
    new = ar.rewrite(gpt_of(laid_out_between), (ids(),), dynamic_shapes={})
    assert new.report.streams[0].num_updates == 4


class Images(nn.Module):
    """A pre-activation network of images [B, C, H, W] whose head views the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(2, 4) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(4 * 5 * 5, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(norm(x).relu())
        return self.head(x.relu().view(x.shape[0], -1))


def test_a_state_of_images_is_laid_out_as_it_was():
    new = ar.rewrite(Images().eval(), (torch.randn(2, 3, 5, 5),), dynamic_shapes={})
    assert new.report.streams[0].width == 4
