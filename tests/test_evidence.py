"""The evidence example on its smallest preset: text, equal starts, batches and resumption, results and the page."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "evidence"))

import loop  # noqa: E402
import throughput  # noqa: E402
import train  # noqa: E402
from settings import PRESETS, VARIANTS, config_of  # noqa: E402
from text import Corpus, is_validation, load_corpus  # noqa: E402

import attnres_rewrite as ar  # noqa: E402

TINY = PRESETS["tiny"]


def numbers(length):
    """Text that has something to learn: each byte is the one before plus 1, 2 or 3."""
    steps = torch.randint(1, 4, (length,), generator=torch.Generator().manual_seed(0))
    return steps.cumsum(0).remainder(64).to(torch.uint8)


CORPUS = Corpus(numbers(2000), numbers(400), python="3.x", sha256="0" * 64, files=(1, 1))


def run(variant, folder, preset=TINY, stop_at=None, corpus=CORPUS):
    model = train.build(variant, 0, preset)
    plan = loop.Plan(preset.steps, preset.warmup, preset.lr, batch_seed=7)
    record = loop.train(model, corpus, preset, plan, folder, stop_at=stop_at)
    return model, record


def test_corpus_is_split_by_file_and_named_by_a_hash(tmp_path):
    names = [f"pkg/m{i}.py" for i in range(60)]
    for name in [*names, "pkg/test/seen_by_nobody.py", "site-packages/other.py", "_sysconfigdata_x.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    corpus = load_corpus(tmp_path)

    train_names = sorted(name for name in names if not is_validation(name))
    assert bytes(corpus.train.tolist()).decode() == "".join(train_names)
    held_out = sorted(set(names) - set(train_names))
    assert bytes(corpus.validation.tolist()).decode() == "".join(held_out)
    assert corpus.files == (len(train_names), len(held_out))

    (tmp_path / "pkg/m3.py").write_bytes(b"changed")
    assert load_corpus(tmp_path).sha256 != corpus.sha256


def test_this_python_has_a_corpus():
    corpus = load_corpus()
    assert len(corpus.train) > 8 * len(corpus.validation) / 2 > 100_000
    assert corpus.sha256 == load_corpus().sha256


def test_a_python_without_sources_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="installed without its sources"):
        load_corpus(tmp_path)


def test_variants_start_alike_and_differ_only_by_their_reads():
    models = {variant: train.build(variant, 3, TINY) for variant in VARIANTS}
    weights = models["original"].state_dict()
    for variant in ("block", "full"):
        states = models[variant].state_dict()
        assert all(torch.equal(states[name], weight) for name, weight in weights.items())
        assert {name.split(".")[-1] for name in states.keys() - weights.keys()} == {"query", "key_norm"}
        assert [proof.output_error for proof in models[variant].report.verify.proofs]
    streams = {variant: models[variant].report.streams[0] for variant in ("block", "full")}
    assert len(streams["block"].blocks) == TINY.blocks
    assert len(streams["full"].blocks) == streams["full"].num_updates == 2 * TINY.layers


def test_optimizer_decays_matrices_only():
    model = train.build("block", 0, TINY)
    decayed, vectors, reads = loop.optimizer_for(model, 1e-3, TINY).param_groups
    assert (decayed["weight_decay"], vectors["weight_decay"], reads["weight_decay"]) == (TINY.weight_decay, 0, 0)
    assert {id(p) for p in reads["params"]} == {id(p) for p in ar.attnres_parameters(model)}
    assert all(p.ndim == 2 for p in decayed["params"])
    groups = (decayed, vectors, reads)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    plan = loop.Plan(steps=100, warmup=10, lr=2.0, batch_seed=0)
    rates = [loop.learning_rate(step, plan) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0) == max(rates)
    assert rates[54] == pytest.approx(1.1)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize("variant", ["original", "block"])
def test_resumed_run_equals_an_uninterrupted_one(variant, tmp_path):
    whole_model, whole = run(variant, tmp_path / "whole")
    assert len(whole.train_loss) == TINY.steps
    assert whole.train_loss[-1] < whole.train_loss[0]

    _, half = run(variant, tmp_path / "parts", stop_at=8)
    assert len(half.train_loss) == 8
    # a fresh process has other numbers in its generator
    torch.manual_seed(99)
    model, record = run(variant, tmp_path / "parts")
    assert record.train_loss == whole.train_loss
    assert record.validation == whole.validation
    assert record.final_validation == whole.final_validation
    states = whole_model.state_dict()
    assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())


def test_validation_loss_is_the_mean_over_the_same_windows(tmp_path):
    model = train.build("original", 0, TINY)
    text = CORPUS.validation
    starts = [round(i * (len(text) - TINY.context - 1) / 4 - 0.499) for i in range(5)]
    losses = []
    for start in starts:
        ids = text[start : start + TINY.context + 1].long()
        chances = model(ids[None, :-1])[0].double().softmax(-1)
        losses += (-chances.log()[range(TINY.context), ids[1:]]).tolist()
    found = loop.validate(model, text, TINY, 5)
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_loss_that_is_not_finite_ends_the_run_and_keeps_it(tmp_path, capsys):
    preset = replace(TINY, lr=1e30, clip=1e30)
    _, record = run("original", tmp_path, preset)
    assert record.ended
    assert "at step" in record.ended
    assert 1 <= len(record.train_loss) < preset.steps
    assert record.final_validation is None
    facts = record.facts()
    assert facts["train_loss"][-1] is None
    assert json.loads(json.dumps(facts, allow_nan=False))["train_loss"][0] > 0

    again = run("original", tmp_path, preset)[1]
    assert again.ended == record.ended
    train.report(train.Console(), "original", record)
    assert "the run is kept" in capsys.readouterr().out.replace("\n", " ")


def test_throughput_times_all_variants_in_turns():
    rows = throughput.measure(TINY, CORPUS, rounds=2)
    assert list(rows) == list(VARIANTS)
    assert rows["original"]["ratio"] == 1
    assert all(row["ms"] > 0 for row in rows.values())


def test_presets_are_as_deep_as_the_page_says():
    assert PRESETS["cpu"].layers >= 12
    assert PRESETS["gpu"].layers >= 16
    assert config_of("original", TINY) is None
    assert config_of("full", TINY).num_blocks == "full"
