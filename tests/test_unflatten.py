"""Mirrors attnres_rewrite/unflatten.py: layers that are called again compute what the flat graph does."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import attnres_rewrite as ar
from attnres_rewrite.kernels.inter_block.op import inter_block
from attnres_rewrite.kernels.merge.op import add_merge_norm
from tests.joint import mm_dit
from tests.networks import VOCAB, Gpt, ids
from tests.processes import run_on_ranks


def rewritten(model: nn.Module, config: ar.AttnResConfig | None = None) -> ar.RewrittenModule:
    new = ar.rewrite(model.double(), (ids(),), config=config or ar.AttnResConfig(block_size=3), verify=False)
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            parameter.add_(torch.randn_like(parameter))
    return new


def results(model, inputs=None):
    model.zero_grad()
    torch.manual_seed(1)
    out = model(ids() if inputs is None else inputs)
    out.square().mean().backward()
    return out.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(model, new, inputs=None):
    found, wanted = results(model, inputs), results(new, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


CONFIGS = {
    "blocks": ar.AttnResConfig(block_size=3),
    "full": ar.AttnResConfig(num_blocks="full"),
    "direct": ar.AttnResConfig(block_size=3, schedule="direct"),
    "gate": ar.AttnResConfig(block_size=2, gate=True, recency_bias=1.0),
    "heads": ar.AttnResConfig(block_size=2, num_heads=2, output="mean"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_same_function_in_both_modes(config):
    new = rewritten(Gpt(depth=4, dropout=0.2), config)
    model = ar.unflatten(new, "layers.*")
    assert model.state_dict().keys() == new.state_dict().keys()
    assert all(one is other for one, other in zip(model.parameters(), new.parameters(), strict=True))
    for mode in (True, False):
        assert_same(model.train(mode), new.train(mode))
        assert all(module.training == mode for module in model.modules())
        assert_same(model, new, torch.randint(0, VOCAB, (3, 5)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layers_of_two_streams_side_by_side(config):
    model, inputs = mm_dit(single=2)
    if config.output == "mean" and not config.gate:
        config = replace(config, output="sum")
    model, inputs = model.double(), tuple(value.double() for value in inputs)
    new = ar.rewrite(model, inputs, config=config, verify=False)
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            parameter.add_(torch.randn_like(parameter))
    # a stream is done with a layer before the other is, and its read belongs to the next one
    torch.testing.assert_close(ar.unflatten(new, "layers.*")(*inputs), new(*inputs), rtol=1e-12, atol=1e-12)


def test_what_goes_into_each_layer_and_comes_out():
    model = ar.unflatten(rewritten(Gpt(depth=4), ar.AttnResConfig(block_size=4)), "layers.*")
    seen = {}

    def note(layer, args, out):
        seen[names[layer]] = (len(args), type(out))

    names = {layer: name for name, layer in model.layers.named_children()}
    for layer in names:
        layer.register_forward_hook(note)
    model(ids())
    # the embedding, the finished block, the partial sum -> the partial sum
    assert seen == {name: (count, torch.Tensor) for name, count in {"0": 1, "1": 2, "2": 2, "3": 3}.items()}


def test_reads_are_scheduled_and_fused_in_each_layer():
    model = ar.unflatten(rewritten(Gpt(depth=4), ar.AttnResConfig(block_size=4)), "layers.*")
    called = [node.target for node in model.layers.get_submodule("3").graph.nodes]
    assert inter_block in called
    assert add_merge_norm in called


def test_checkpointed_layers_keep_less():
    new = rewritten(Gpt(depth=4, dropout=0.2)).train()
    model = ar.unflatten(new, "layers.*")

    def saved(module):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            module(ids())
        own = {parameter.data_ptr() for parameter in module.parameters()}
        return sum(t.nbytes for pointer, t in kept.items() if pointer not in own)

    whole = saved(model)
    for layer in model.layers.children():
        layer.forward = lambda *args, run=layer.forward: checkpoint(run, *args, use_reentrant=False)
    assert saved(model) < whole / 3
    assert_same(model, new)


def test_layers_compile_one_by_one():
    new = rewritten(Gpt(depth=3))
    model = ar.unflatten(new, "layers.*")
    for layer in model.layers.children():
        layer.compile(backend="aot_eager", fullgraph=True)
    assert_same(model, new)


def test_copies_have_parameters_of_their_own():
    new = rewritten(Gpt(depth=2, dropout=0.2))
    model = copy.deepcopy(ar.unflatten(new, "layers.*"))
    assert_same(model, new)
    with torch.no_grad():
        model.layers.get_submodule("0").norm_1.weight.add_(1)
    assert not torch.equal(model(ids()), new(ids()))


def test_a_loaded_rewrite(tmp_path):
    new = rewritten(Gpt(depth=2, dropout=0.2))
    loaded = ar.load(ar.save(new, tmp_path / "saved"))
    model = ar.unflatten(loaded, ["layers.0", "layers.1"])
    for mode in (False, True):
        assert_same(model.train(mode), new.train(mode))


class Regions(Gpt):
    """Each layer ends in a region that torch.export keeps as one call."""

    def __init__(self):
        super().__init__(depth=2)
        for layer in self.layers:
            inner = layer.mlp.forward
            layer.mlp.forward = lambda x, inner=inner: self.without_autocast(inner, x)

    def without_autocast(self, inner, x):
        with torch.autocast("cpu", enabled=False):
            return inner(x)


def test_bodies_of_regions_move_along():
    new = rewritten(Regions())
    model = ar.unflatten(new, "layers.*")
    assert_same(model, new)
    assert_same(copy.deepcopy(model), new)


class Looped(Gpt):
    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(2):
            for layer in self.layers:
                x = layer(x)
        return self.head(self.norm(x))


def test_refusals():
    new = rewritten(Gpt(depth=2))
    with pytest.raises(TypeError, match="takes what rewrite\\(\\) or load\\(\\) returned; this is a Gpt"):
        ar.unflatten(Gpt(depth=2), "layers.*")
    for nothing in (None, 3, [], [0]):
        with pytest.raises(TypeError, match="modules is a name, a pattern, or a sequence of them; got"):
            ar.unflatten(new, nothing)
    with pytest.raises(ValueError, match=r"no module is named 'h\.\*'; the model has embed, layers"):
        ar.unflatten(new, "h.*")
    with pytest.raises(ValueError, match=r"layers\.0\.norm_1 is inside of layers\.0"):
        ar.unflatten(new, ["layers.*", "layers.0.norm_1"])
    with pytest.raises(ar.PartitionError, match="embed.weight and head.weight are one parameter"):
        ar.unflatten(new, ["embed"])
    with pytest.raises(ar.PartitionError, match=r"layers\.1 begins before layers\.0 has ended"):
        ar.unflatten(rewritten(Looped(depth=2)), "layers.*")
    shared = Gpt(depth=2)
    shared.layers[1].mlp = shared.layers[0].mlp
    with pytest.raises(ar.PartitionError, match="are one parameter"):
        ar.unflatten(rewritten(shared), "layers.*")


def test_it_is_no_rewrite():
    model = ar.unflatten(rewritten(Gpt(depth=2)), "layers.*")
    with pytest.raises(TypeError, match="a UnflattenedModule is not pickled; keep its state_dict()"):
        pickle.dumps(model)
    for function in (ar.verify, lambda model: ar.partition(model, 2), lambda model: ar.unflatten(model, "layers.*")):
        with pytest.raises(TypeError, match=r"this is a UnflattenedModule\. .* new\.load_state_dict"):
            function(model)
    with pytest.raises(ar.NotRewrittenError, match=r"Diagnose the rewrite it was made of: new\.load_state_dict"):
        ar.diagnose(model, [(ids(),)])


def train_sharded(whole: bool) -> None:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    new, batch = rewritten(Gpt(depth=3)), torch.randint(0, VOCAB, (4, 5), generator=torch.Generator().manual_seed(1))
    wanted = copy.deepcopy(new)
    model = new if whole else ar.unflatten(new, "layers.*")
    for layer in () if whole else model.layers.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, reference = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, wanted))
    for _ in range(2):
        optimizer.zero_grad()
        model(batch.chunk(2)[mesh.get_local_rank()]).square().mean().backward()
        optimizer.step()
        reference.zero_grad()
        sum(wanted(part).square().mean() / 2 for part in batch.chunk(2)).backward()
        reference.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(state, wanted.state_dict(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(model.eval()(batch), wanted.eval()(batch), rtol=1e-11, atol=1e-13)


# examples/14_sharded.py does so with checkpointed layers
@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["layers", "whole"])
def test_sharded_parameters(whole):
    run_on_ranks(2, train_sharded, whole)


def train_in_half(layers: nn.ModuleList, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[float]:
    """Shard on one process with parameters gathered in bfloat16; return the losses of some steps."""
    mesh, policy = init_device_mesh("cpu", (1,)), MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in layers.children():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")
def test_parameters_gathered_in_bfloat16_of_a_model_that_casts(tmp_path):
    """The recipe of docs/ways.md: the graph is captured in the precision in which it will run."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCAB, **sizes, use_cache=False))
    plain, batch = copy.deepcopy(model), {"input_ids": ids(), "labels": ids()}

    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    new = ar.rewrite(model, kwargs=batch, config=ar.AttnResConfig(num_blocks=2))
    assert new.report.verify.passed
    model = ar.unflatten(new, "model.layers.*")
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("attn_res" in name for name in missing)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found, wanted = train_in_half(model.model.layers, model, batch), train_in_half(plain.model.layers, plain, batch)
    finally:
        torch.distributed.destroy_process_group()
    assert found[2] < found[0]
    assert found[0] == pytest.approx(wanted[0], rel=2e-3)
