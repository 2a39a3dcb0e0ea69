"""Mirrors attnres_rewrite/first_values.py: values for a model that was built without memory."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import attnres_rewrite as ar
from attnres_rewrite import first_values
from tests.networks import VOCAB, WIDTH, Gpt
from tests.processes import run_on_ranks

CONFIG = ar.AttnResConfig(num_blocks=2, gate=True)
example = torch.zeros(2, 5, dtype=torch.long)


class Tabled(Gpt):
    """A GPT with a class token of its own and a table that is in no state dict."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.token = nn.Parameter(torch.empty(WIDTH))
        self.register_buffer("table", torch.empty(5, WIDTH), persistent=False)
        self.register_buffer("mask", torch.empty(5, dtype=torch.bool))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.table + self.token
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x) * self.mask.unsqueeze(-1))


def fresh(model: nn.Module) -> None:
    """Set every number of the model, some of them from a module around theirs."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("down.weight"):
            parameter.data.normal_(std=0.5)
    nn.init.normal_(model.token)
    model.table.copy_(torch.arange(5 * WIDTH).view(5, WIDTH) / 80)
    model.mask.fill_(value=True)


def on_meta() -> tuple[nn.Module, ar.RewrittenModule]:
    with torch.device("meta"):
        model = Tabled()
    return model, ar.rewrite(model, (example.to("meta"),), config=CONFIG, verify=False, dynamic_shapes={})


def initialized(seed: int = 0) -> ar.RewrittenModule:
    model, new = on_meta()
    new.to_empty(device="cpu")
    ar.initialize(new, model, fresh, seed=seed)
    return new


def test_every_number_is_set_by_the_code_of_its_module():
    new = initialized()
    assert not any(value.isnan().any() for value in new.parameters())
    assert new.get_submodule("layers.1").mlp.down.weight.std() > 0.4
    assert new.get_submodule("layers.1").mlp.up.weight.std() < 0.15
    assert new.table[4, 1] == 65 / 80
    assert new.mask.all()
    # reads begin as the original, whatever init does
    read = new.get_submodule("layers.1.attn_res.0")
    assert (read.query.abs().max(), read.key_norm.min(), read.gate.abs().max()) == (0, 1, 0)


def test_the_network_computes_what_the_original_does_with_these_weights():
    new, model = initialized(), Tabled()
    fresh(model)
    model.load_state_dict(new.state_dict(), strict=False)
    ids = torch.randint(0, VOCAB, (2, 5))
    torch.testing.assert_close(new(ids), model(ids))
    assert ar.verify(new, (ids,)).passed


def test_the_model_stays_on_meta():
    model, new = on_meta()
    before = {name: id(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    new.to_empty(device="cpu")
    ar.initialize(new, model, fresh)
    assert before == {name: id(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    assert all(value.is_meta for value in model.parameters())


def test_numbers_follow_from_the_seed_and_the_name():
    before = torch.get_rng_state()
    first, second, other = initialized(), initialized(), initialized(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.named_parameters():
        assert torch.equal(value, second.get_parameter(name)), name
    assert not torch.equal(first.get_parameter("layers.0.mlp.up.weight"), other.get_parameter("layers.0.mlp.up.weight"))
    assert not torch.equal(first.get_parameter("layers.0.mlp.up.weight"), first.get_parameter("layers.1.mlp.up.weight"))


def test_a_tied_parameter_is_what_the_code_leaves_in_it():
    def by_name(model: nn.Module) -> None:
        fresh(model)
        model.embed.weight.fill_(1.0)
        model.head.weight.fill_(2.0)

    model, new = on_meta()
    new.to_empty(device="cpu")
    ar.initialize(new, model, by_name)
    weights = {name: value for name, value in new.state_dict().items() if name in ("embed.weight", "head.weight")}
    assert all((value == 2).all() for value in weights.values())


def test_a_tensor_that_init_puts_in_place_of_its_own_counts():
    def replaces(model: nn.Module) -> None:
        fresh(model)
        model.table = torch.full((5, WIDTH), 3.0)
        model.embed.weight = nn.Parameter(torch.full((VOCAB, WIDTH), 4.0))

    model, new = on_meta()
    new.to_empty(device="cpu")
    ar.initialize(new, model, replaces)
    assert (new.table == 3).all()
    assert (new.get_parameter("embed.weight") == 4).all()


def test_the_weights_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, use_cache=False, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    new = ar.rewrite(model, (example.to("meta"),), {"use_cache": False}, CONFIG, verify=False)
    new.to_empty(device="cpu")
    ar.initialize(new, model, lambda model: model.initialize_weights())
    original = LlamaForCausalLM(config)
    original.load_state_dict(new.state_dict(), strict=False)
    torch.testing.assert_close(new(example).logits, original(example).logits)
    assert torch.equal(new.get_buffer("model.rotary_emb.inv_freq"), original.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda model, init: (Gpt(depth=2), init), "has no parameter or buffer token"),
        (lambda model, init: (nn.ModuleDict({"layers": model.layers}), init), "has no parameter or buffer"),
        (lambda model, init: (model, lambda model: None), "init left .* without values"),
        (lambda model, init: (Wider(), init), r"embed.weight is \[31, 8\] in the model that was given"),
        (lambda model, init: (model, functools.partial(leaves_out, "mask")), "init left mask without values"),
        (lambda model, init: (model, functools.partial(leaves_out, "token")), "init left token without values"),
        (lambda model, init: (model, reshapes), r"init made token \[3\]"),
    ],
)
def test_bad_input(break_it, message):
    model, new = on_meta()
    new.to_empty(device="cpu")
    with pytest.raises(ValueError, match=message):
        ar.initialize(new, *break_it(model, fresh))


class Wider(Tabled):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)


def leaves_out(leaf: str, model: nn.Module) -> None:
    kept = getattr(model, leaf)
    setattr(model, leaf, type(kept)(kept.clone()) if leaf == "token" else kept.clone())
    fresh(model)
    setattr(model, leaf, kept)


def reshapes(model: nn.Module) -> None:
    fresh(model)
    model.token = nn.Parameter(torch.zeros(3))


def test_what_cannot_be_initialized_keeps_its_values():
    new = initialized()
    before = {name: value.clone() for name, value in new.state_dict().items()}
    model, _ = on_meta()
    for wrong, message in (
        ((None, model, fresh), "got NoneType"),
        ((new, 3, fresh), "got int"),
        ((new, model, 3), "got int"),
    ):
        with pytest.raises(TypeError, match=message):
            ar.initialize(*wrong)
    with pytest.raises(ValueError, match="has no parameter"):
        ar.initialize(new, Gpt(depth=1), fresh)
    assert all(torch.equal(value, before[name]) for name, value in new.state_dict().items())


def test_without_memory():
    model, new = on_meta()
    with pytest.raises(ValueError, match=r"on the meta device: give it memory first, module.to_empty"):
        ar.initialize(new, model, fresh)


def test_the_weights_that_a_module_around_them_sets():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, n_positions=8, use_cache=False)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    new = ar.rewrite(model, (example.to("meta"),), {"use_cache": False}, CONFIG, verify=False).to_empty(device="cpu")
    ar.initialize(new, model, lambda model: model.initialize_weights())
    # GPT-2 scales the projections into the stream by its depth: 0.02 / sqrt(2 * 2)
    assert new.get_parameter("transformer.h.1.mlp.c_proj.weight").detach().std() == pytest.approx(0.01, rel=0.05)
    assert new.get_parameter("transformer.h.1.mlp.c_fc.weight").detach().std() == pytest.approx(0.02, rel=0.05)


def shard_and_compare(folder: str) -> None:
    first_values._WHOLE_BYTES = 4096  # several groups
    model, new = on_meta()
    part, mesh = ar.unflatten(new, "layers.*"), init_device_mesh("cpu", (2,))
    for name, layer in list(part.layers.named_children()):
        setattr(part.layers, name, fully_shard(checkpoint_wrapper(layer), mesh=mesh))
    fully_shard(part, mesh=mesh)
    part.to_empty(device="cpu")
    ar.initialize(part, model, fresh)
    assert all(isinstance(value, DTensor) for value in part.parameters())
    whole = torch.load(Path(folder) / "whole.pt")
    state = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in part.state_dict().items()}
    for name, value in state.items():
        found = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.equal(found, whole[name]), name
    reference = initialized()
    expected = reference(example)
    torch.testing.assert_close(part(example), expected)
    part(example).square().mean().backward()
    reference(example).square().mean().backward()
    for name, value in part.named_parameters():
        plain = name.replace("_checkpoint_wrapped_module.", "")
        torch.testing.assert_close(value.grad.full_tensor(), reference.get_parameter(plain).grad)


def test_sharded_layers_start_as_one_process_does(tmp_path):
    torch.save(initialized().state_dict(), tmp_path / "whole.pt")
    run_on_ranks(2, shard_and_compare, str(tmp_path))
