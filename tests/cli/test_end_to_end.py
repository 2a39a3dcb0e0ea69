"""The commands over the real library, on the example GPT and on a small Hugging Face model."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_inspect_finds_the_stream_of_the_gpt(cli, folder):
    facts = cli("inspect", EXAMPLES / "gpt.py", "--block-layers", 2, "--json").facts
    (stream,) = facts["streams"]
    assert (stream["num_updates"], stream["width"]) == (12, 128)
    assert stream["blocks"] == [[1, 4], [5, 8], [9, 12]]
    assert [read["state"] for read in stream["reads"]] == list(range(1, 13))
    assert stream["reads"][0]["source_line"].rpartition("/")[2].startswith("gpt.py:")
    assert facts["left_alone"]
    assert list(folder.iterdir()) == []


def test_rewrite_then_verify_then_inspect(cli):
    done = cli("rewrite", f"{EXAMPLES / 'gpt.py'}:build", "--blocks", 4, "--json")
    assert done.code == 0, done.out + done.err
    assert done.facts["verify"]["passed"] is True
    assert Path(done.facts["saved"]).resolve() == Path("gpt.attnres").resolve()
    again = cli("verify", "gpt.attnres", "--json")
    assert again.code == 0, again.out + again.err
    assert {proof["name"] for proof in again.facts["proofs"]} >= {"independent"}
    assert len(cli("inspect", "gpt.attnres", "--json").facts["streams"][0]["blocks"]) == 4
    assert cli("rewrite", "gpt.attnres", "-o", "twice.attnres").code == 1
    assert not Path("twice.attnres").exists()


def test_a_folder_that_exists_stays_as_it_is(cli, folder):
    (folder / "gpt.attnres").mkdir()
    (folder / "gpt.attnres" / "thesis.txt").write_text("mine")
    assert cli("rewrite", EXAMPLES / "gpt.py").code == 1
    assert (folder / "gpt.attnres" / "thesis.txt").read_text() == "mine"


def test_a_damaged_rewrite_is_refused(cli, folder):
    (folder / "bad.attnres").mkdir()
    (folder / "bad.attnres" / "attnres.json").write_text("{")
    done = cli("verify", "bad.attnres", "--json")
    assert done.code == 1
    assert done.facts["error"]["class"] == "ArtifactError"


def test_more_blocks_than_updates_is_a_wrong_argument(cli):
    done = cli("inspect", EXAMPLES / "gpt.py", "--blocks", 13)
    assert done.code == 2
    assert "13" in done.err
    assert "12" in done.err


def test_a_model_without_a_stream_is_refused(cli, folder):
    (folder / "net.py").write_text("import torch\ndef build(): return torch.nn.Linear(3, 3), (torch.ones(2, 3),)\n")
    done = cli("rewrite", "net.py", "--json")
    assert done.code == 1
    assert done.facts["error"]["class"] == "NoStreamError"
    assert not (folder / "net.attnres").exists()


def test_inputs_that_do_not_fit_are_refused(cli, folder):
    (folder / "net.py").write_text("import torch\ndef build(): return torch.nn.Linear(3, 3), (torch.ones(2, 4),)\n")
    done = cli("inspect", "net.py", "--json")
    assert done.code == 1
    assert done.facts["error"]["class"] == "CaptureError"


def test_verify_a_hugging_face_folder(cli, folder):
    pytest.importorskip("transformers")
    config = json.loads((EXAMPLES / "qwen3_small" / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 64, "intermediate_size": 32}))
    done = cli("verify", ".", "--seq", 8)
    assert done.code == 0, done.err
    assert "every parameter of Qwen3ForCausalLM is random" in done.err
    assert "FAILED" not in done.out
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_kimi_linear_48b_on_meta(cli):
    pytest.importorskip("transformers")
    done = cli("inspect", EXAMPLES / "kimi_linear_48b", "--meta", "--block-size", 6, "--json")
    assert done.code == 0, done.err
    (stream,) = done.facts["streams"]
    assert (stream["num_updates"], len(stream["blocks"]), stream["width"]) == (54, 9, 2304)
