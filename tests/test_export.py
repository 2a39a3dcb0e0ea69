"""torch.export of a rewritten model: one file of torch's own operations, which needs nothing of ours."""

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import attnres_rewrite as ar
from tests.networks import VOCAB, Gpt

# torch copies its own programs so
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
CONFIG = ar.AttnResConfig(num_blocks=2)
SIZES = ({0: Dim("batch"), 1: Dim("length", max=64)},)
ids, request_ids = torch.arange(16).reshape(2, 8) % VOCAB, torch.arange(33).reshape(3, 11) % VOCAB


def with_random_queries(new: ar.RewrittenModule) -> ar.RewrittenModule:
    with torch.no_grad():
        for parameter in ar.attnres_parameters(new):
            parameter.add_(torch.randn_like(parameter))
    return new.eval()


@pytest.fixture(params=["auto", "direct", "two_phase"])
def new(request) -> ar.RewrittenModule:
    config = ar.AttnResConfig(num_blocks=2, schedule=request.param)
    return with_random_queries(ar.rewrite(Gpt(depth=2), (ids,), config=config, verify=False))


def assert_ours_is_gone(program: ExportedProgram) -> None:
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert all(
        "attnres" not in str(target) and "attnres" not in getattr(target, "__module__", "") for target in targets
    )


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rewrite_is_exported_with_dynamic_sizes(new, strict):
    program = torch.export.export(new, (ids,), dynamic_shapes=SIZES, strict=strict)
    assert_ours_is_gone(program)
    torch.testing.assert_close(program.module()(request_ids), new(request_ids))
    assert program.state_dict.keys() == new.state_dict().keys()


@pytest.mark.parametrize("new", ["two_phase"], indirect=True)
def test_a_saved_file_runs(new, tmp_path):
    torch.export.save(torch.export.export(new, (ids,), dynamic_shapes=SIZES), tmp_path / "new.pt2")
    served = torch.export.load(tmp_path / "new.pt2").module()
    torch.testing.assert_close(served(request_ids), new(request_ids))


@pytest.mark.parametrize("new", ["two_phase"], indirect=True)
def test_decompositions_leave_core_operations(new):
    program = torch.export.export(new, (ids,), dynamic_shapes=SIZES).run_decompositions()
    assert_ours_is_gone(program)
    torch.testing.assert_close(program.module()(request_ids), new(request_ids))


@pytest.mark.parametrize("new", ["two_phase"], indirect=True)
def test_a_loaded_rewrite_and_its_layers(new, tmp_path):
    ar.save(new, tmp_path / "new")
    loaded = ar.load(tmp_path / "new").eval()
    for module in (loaded, ar.unflatten(loaded, "layers.*").eval()):
        program = torch.export.export(module, (ids,))
        assert_ours_is_gone(program)
        torch.testing.assert_close(program.module()(ids), new(ids))


@pytest.mark.parametrize("config", [{"num_heads": 4}, {"key_rank": 4}, {"gate": True}, {"recency_bias": 1.0}])
def test_variants(config):
    made = ar.rewrite(Gpt(depth=2), (ids,), config=ar.AttnResConfig(num_blocks=2, **config), verify=False)
    new = with_random_queries(made)
    program = torch.export.export(new, (ids,), dynamic_shapes=SIZES)
    assert_ours_is_gone(program)
    torch.testing.assert_close(program.module()(request_ids), new(request_ids))


def test_a_transformers_model_keeps_its_output_class():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, use_cache=False, **sizes)
    made = ar.rewrite(transformers.LlamaForCausalLM(config), kwargs={"input_ids": ids}, config=CONFIG, verify=False)
    new = with_random_queries(made)
    program = torch.export.export(new, (), {"input_ids": ids}, dynamic_shapes={"input_ids": SIZES[0]})
    assert_ours_is_gone(program)
    found = program.module()(input_ids=request_ids)
    assert type(found) is type(new(input_ids=request_ids))
    torch.testing.assert_close(found.logits, new(input_ids=request_ids).logits)


def test_an_export_can_be_rewritten_after_it_was_trained():
    """The other order: export the original, rewrite the program."""
    model = Gpt(depth=2).eval()
    program = torch.export.export(model, (ids,), dynamic_shapes=SIZES)
    new = ar.rewrite(program, (ids,), config=CONFIG)
    torch.testing.assert_close(new(request_ids), model(request_ids))


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    new = with_random_queries(ar.rewrite(Gpt(depth=2), (ids,), config=CONFIG, verify=False))
    program = torch.export.export(new, (ids,), dynamic_shapes=SIZES)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "new.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    assert not isinstance(compiled, nn.Module)
    torch.testing.assert_close(compiled(request_ids), new(request_ids), rtol=1e-4, atol=1e-5)
