"""A Hugging Face folder that was trained with reads: every command works on those, not on zero queries."""

import json
import math

import pytest
import torch

import attnres_rewrite as ar
from attnres_rewrite.cli import load

transformers = pytest.importorskip("transformers")
CONFIG = ar.AttnResConfig(num_blocks=3)
ids = torch.arange(10).view(1, -1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that save_pretrained() wrote of an attached model with random queries, and that model's logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes)).eval()
    ar.attach(model, CONFIG)
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("trained") / "llama"
    model.save_pretrained(folder)
    return folder, ar.as_rewritten(model, verify=False)(input_ids=ids, use_cache=False).logits


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_it_is_saved_with_its_queries(cli, trained):
    folder, logits = trained
    done = cli("rewrite", folder, "-o", "llama.attnres")
    assert done.code == 0
    assert "was trained with Attention Residuals" in done.err
    new = ar.load("llama.attnres").eval()
    assert new.config == CONFIG
    assert new.report.verify.passed
    torch.testing.assert_close(new(input_ids=ids).logits, logits)


def test_its_own_config_is_inspected(cli, trained):
    found = cli("inspect", trained[0], "--json").facts
    assert found["config"]["num_blocks"] == 3
    assert len(found["streams"][0]["blocks"]) == 3
    assert cli("inspect", trained[0], "--meta", "--json").facts["streams"][0]["blocks"] == found["streams"][0]["blocks"]


def test_its_weights_are_diagnosed(cli, trained):
    reads = cli("diagnose", trained[0], "--no-plots", "--json").facts["streams"][0]["reads"]
    # zero queries would weigh all sources alike
    assert all(read["entropy"] < 0.99 * math.log(len(read["sources"])) for read in reads)


def test_it_is_no_twin_without_reads_and_random_weights_are_said(cli, trained, tmp_path):
    done = cli("diagnose", trained[0], "--baseline", trained[0], "--no-plots")
    assert done.code == 1
    assert "was trained with Attention Residuals\n  A twin was trained without them." in done.err
    plain = json.loads((trained[0] / "config.json").read_text())
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(
        json.dumps({name: value for name, value in plain.items() if name != "attn_res"})
    )
    done = cli("diagnose", trained[0], "--baseline", "plain", "--no-plots")
    assert done.code == 0, done.err
    assert "warning: --baseline: plain holds no weights: every parameter of LlamaForCausalLM is random" in done.err


@pytest.mark.parametrize("command", [("verify",), ("partition", "--ranks", "2"), ("report", "--no-verify")])
def test_the_other_commands(cli, trained, command):
    done = cli(command[0], trained[0], *command[1:])
    assert done.code == 0
    assert "was trained with Attention Residuals" in done.err


def test_another_config_is_a_wrong_argument(cli, trained):
    done = cli("inspect", trained[0], "--blocks", "2")
    assert done.code == 2
    assert "num_blocks=2 contradicts the config this model was saved with, num_blocks=3: leave it out" in done.err
    assert "gate=True contradicts" in cli("inspect", trained[0], "--blocks", "3", "--gate").err
    assert cli("inspect", trained[0], "--blocks", "3").code == 0


def test_queries_without_a_config_are_refused_until_it_is_given(cli, trained, tmp_path):
    folder, logits = trained
    facts = json.loads((folder / "config.json").read_text())
    del facts["attn_res"]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(facts))
    (tmp_path / "bare" / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert load.load("bare").kind == "trained"
    done = cli("rewrite", "bare")
    assert done.code == 1
    assert "the config they belong to was not" in done.err
    assert cli("rewrite", "bare", "--blocks", "3", "--no-verify").code == 0
    torch.testing.assert_close(ar.load("bare.attnres").eval()(input_ids=ids).logits, logits)


def test_python_warns_of_queries_that_were_left_out(trained):
    model = transformers.LlamaForCausalLM.from_pretrained(trained[0])
    with pytest.warns(UserWarning, match="saved with queries, which from_pretrained\\(\\) left out"):
        ar.inspect(model, kwargs={"input_ids": ids})
    # attached, it has them: a refusal says what to do, and no warning
    ar.attach(model)
    with pytest.raises(ar.AlreadyRewrittenError, match="as_rewritten"):
        ar.inspect(model, kwargs={"input_ids": ids})


FACTORIES = """
import torch
import attnres_rewrite as ar
from tests.networks import Gpt

ids = torch.zeros(2, 8, dtype=torch.long)

def _trained(model):
    with torch.no_grad():
        for parameter in ar.attnres_parameters(model):
            parameter.fill_(0.5)
    return model

def attached():
    model = Gpt(depth=2)
    ar.attach(model, ar.AttnResConfig(num_blocks=2), (ids,))
    return _trained(model), (ids,)

def rewritten():
    return _trained(ar.rewrite(Gpt(depth=2), (ids,), config=ar.AttnResConfig(num_blocks=2), verify=False))
"""


@pytest.mark.parametrize("factory", ["attached", pytest.param("rewritten", marks=pytest.mark.slow)])
def test_a_factory_may_give_a_model_with_reads(cli, tmp_path, factory):
    (tmp_path / "net.py").write_text(FACTORIES)
    spec = f"net.py:{factory}"
    assert len(cli("inspect", spec, "--json").facts["streams"][0]["blocks"]) == 2
    assert cli("verify", spec).code == 0
    assert "is no rewrite" not in cli("diagnose", spec, "--no-plots").err
    assert cli("rewrite", spec, "-o", "net.attnres").code == 0
    assert all(parameter.eq(0.5).all() for parameter in ar.attnres_parameters(ar.load("net.attnres")))
    done = cli("inspect", spec, "--blocks", "3")
    assert done.code == 2
    assert "gives a model with reads" in done.err
