"""attnres-rewrite report, with the real library."""

import json

import pytest


def test_a_page_is_written(cli, tiny_file, tmp_path):
    target = tmp_path / "tiny.html"
    done = cli("report", tiny_file, "--blocks", 2, "-o", target)
    assert done.code == 0
    assert done.out == f"saved  {target}\n"
    page = target.read_text()
    assert page.startswith("<!doctype html>")
    assert "<h1>Tiny</h1>" in page
    assert "Proven." in page
    assert page.count('<svg class="sketch"') == 2


def test_it_is_called_after_the_model(cli, tiny_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("report", tiny_file, "--no-verify", "--json")
    assert done.code == 0
    assert done.facts["saved"] == str(tmp_path / "tiny.html")
    assert done.facts["verify"] is None
    assert "NOTHING WAS PROVEN" in done.err
    assert "Nothing was proven." in (tmp_path / "tiny.html").read_text()


def test_a_saved_rewrite_is_shown_as_it_was_saved(cli, tiny_file, tmp_path):
    saved, target = tmp_path / "tiny.attnres", tmp_path / "tiny.html"
    assert cli("rewrite", tiny_file, "--blocks", 3, "-o", saved, "--json").code == 0
    done = cli("report", saved, "-o", target, "--json")
    assert done.code == 0
    assert done.facts == json.loads((saved / "report.json").read_text()) | {"saved": str(target)}
    assert "Proven." in target.read_text()


def test_a_model_on_the_meta_device(cli, tmp_path):
    folder, target = tmp_path / "small", tmp_path / "small.html"
    folder.mkdir()
    facts = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 32}
    sizes = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    (folder / "config.json").write_text(json.dumps(facts | sizes))
    done = cli("report", folder, "--meta", "-o", target)
    assert done.code == 0
    assert "Nothing was proven." in target.read_text()


def test_a_file_that_is_there_stays(cli, tmp_path):
    target = tmp_path / "mine.html"
    target.write_text("mine")
    # refused before the model is looked for
    done = cli("report", tmp_path / "no_such_model.py", "-o", target)
    assert done.code == 1
    assert f"{target} exists" in done.err
    assert "--force" in done.err
    assert target.read_text() == "mine"


def test_force_replaces_it(cli, tiny_file, tmp_path):
    target = tmp_path / "mine.html"
    target.write_text("mine")
    assert cli("report", tiny_file, "--no-verify", "-o", target, "--force").code == 0
    assert target.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_folder_is_not_replaced(cli, tiny_file, tmp_path, force):
    done = cli("report", tiny_file, "-o", tmp_path, *force)
    assert done.code == 2
    assert "is a folder" in done.err


def test_a_folder_that_takes_no_file(cli, tiny_file):
    # where nobody may make a file, whatever the permissions say
    done = cli("report", tiny_file, "-o", "/proc/self/report.html")
    assert done.code == 1
    assert "/proc/self/report.html cannot be written" in done.err


def test_a_folder_that_is_not_there(cli, tiny_file, tmp_path):
    done = cli("report", tiny_file, "-o", tmp_path / "nowhere" / "tiny.html")
    assert done.code == 2
    assert "there is no folder" in done.err


def test_a_model_that_is_not_rewritten_leaves_no_file(cli, tmp_path):
    model, target = tmp_path / "plain.py", tmp_path / "plain.html"
    model.write_text(
        "from torch import nn\nimport torch\n"
        "def build():\n    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.ones(2, 4),)\n"
    )
    done = cli("report", model, "-o", target)
    assert done.code == 1
    assert "refused" in done.err
    assert list(tmp_path.glob("*.html")) == []


def test_options_that_do_not_apply_to_a_saved_rewrite(cli, tiny_file, tmp_path):
    saved = tmp_path / "tiny.attnres"
    assert cli("rewrite", tiny_file, "--no-verify", "-o", saved).code == 0
    done = cli("report", saved, "--blocks", 2, "-o", tmp_path / "tiny.html")
    assert done.code == 2
    assert "is a rewrite already" in done.err


@pytest.fixture
def diagnosis(cli, tiny_file, tmp_path):
    """The file that diagnose writes for the model with two blocks."""
    folder, data = tmp_path / "figures", tmp_path / "data.py"
    data.write_text(
        "import torch\n"
        "def batches():\n    return [(torch.ones(2, 5, 8),)], lambda outputs, batch: outputs.square().mean()\n"
    )
    done = cli("diagnose", tiny_file, "--data", data, "--blocks", 2, "--no-plots", "-o", folder)
    assert done.code == 0, done.err
    return folder / "diagnosis.json"


def test_the_plots_of_a_diagnosis(cli, tiny_file, diagnosis, tmp_path):
    target = tmp_path / "tiny.html"
    done = cli("report", tiny_file, "--blocks", 2, "--no-verify", "--diagnosis", diagnosis, "-o", target)
    assert done.code == 0
    page = target.read_text()
    assert "What the network learnt" in page
    for title in ("Depth attention", "Magnitudes", "Gradient norms", "Entropies"):
        assert f'alt="{title}"' in page
    assert page.count('src="data:image/svg+xml;base64,') == 4
    for term, meaning in (("Mode", "eval"), ("Batches", "1, with 10 tokens"), ("Choices", "num_blocks=2, output=sum")):
        assert f"<dt>{term}</dt><dd>{meaning}" in page
    assert "of a loss_fn that was given" in page


def _add_source(read: dict) -> None:
    for name, value in (("sources", "block 7"), ("weights", 0.0), ("spreads", 0.0)):
        read[name].append(value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda stream, config: stream["reads"][0].update(name="layers.9.attn_res.0"),
            "It has layers.9.attn_res.0 with",
        ),
        (lambda stream, config: _add_source(stream["reads"][0]), "sources where Tiny has"),
        (lambda stream, config: stream["reads"].pop(), "reads of widths [8], and Tiny has"),
        (lambda stream, config: stream.update(width=16), "of widths [16], and Tiny has"),
        (lambda stream, config: config.update(output="mean"), "Its reads mix with output=mean"),
    ],
)
def test_the_diagnosis_of_another_model_is_refused(cli, tiny_file, diagnosis, tmp_path, change, says):
    facts = json.loads(diagnosis.read_text())
    (stream,) = facts["streams"]
    change(stream, facts["config"])
    diagnosis.write_text(json.dumps(facts))
    target = tmp_path / "tiny.html"
    done = cli("report", tiny_file, "--blocks", 2, "--no-verify", "--diagnosis", diagnosis, "-o", target)
    assert done.code == 1
    assert "this is the diagnosis of another model" in done.err
    assert says in done.err
    assert not target.exists()


def test_what_is_no_diagnosis_is_refused(cli, tiny_file, tmp_path):
    done = cli("report", tiny_file, "--diagnosis", tiny_file, "-o", tmp_path / "tiny.html")
    assert done.code == 1
    assert "not a diagnosis" in done.err


def test_a_diagnosis_that_is_not_there(cli, tiny_file, diagnosis, tmp_path):
    done = cli("report", tiny_file, "--diagnosis", diagnosis.parent, "-o", tmp_path / "tiny.html")
    assert done.code == 2
    assert f"is a folder: give the file in it, {diagnosis}" in done.err
    done = cli("report", tiny_file, "--diagnosis", "none.json", "-o", tmp_path / "tiny.html")
    assert done.code == 2
    assert "--diagnosis none.json: there is no such file" in done.err


def test_a_page_is_no_pdf(cli, tiny_file, tmp_path):
    done = cli("report", tiny_file, "-o", tmp_path / "tiny.pdf")
    assert done.code == 2
    assert "must end in .html or .htm" in done.err
    assert not (tmp_path / "tiny.pdf").exists()


def test_what_is_read_is_not_replaced(cli, tiny_file, diagnosis):
    for target, name in ((tiny_file, "MODEL"), (diagnosis, "--diagnosis")):
        before = target.read_text()
        done = cli("report", f"{tiny_file}:build", "--diagnosis", diagnosis, "-o", target, "--force")
        assert done.code == 2
        assert f"would replace {name}" in done.err
        assert target.read_text() == before
