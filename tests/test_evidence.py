"""The evidence example on its smallest preset: text, equal starts, batches and resumption, results and the page."""

import copy
import json
import platform
import re
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "evidence"))

import look  # noqa: E402
import loop  # noqa: E402
import retrofit  # noqa: E402
import summarize  # noqa: E402
import tables  # noqa: E402
import throughput  # noqa: E402
import train  # noqa: E402
from settings import PRESETS, READS, VARIANTS, config_of, fields_of  # noqa: E402
from text import Corpus, is_validation, load_corpus  # noqa: E402

import attnres_rewrite as ar  # noqa: E402

TINY = PRESETS["tiny"]
PAGE = ROOT / "docs" / "evidence.md"
RESULTS = ROOT / "benchmarks" / "results" / "evidence_cpu.json"


def numbers(length):
    """Text that has something to learn: each byte is the one before plus 1, 2 or 3."""
    steps = torch.randint(1, 4, (length,), generator=torch.Generator().manual_seed(0))
    return steps.cumsum(0).remainder(64).to(torch.uint8)


CORPUS = Corpus(numbers(2000), numbers(400), python="3.x", sha256="0" * 64, files=(1, 1))


@pytest.fixture(scope="module")
def models():
    """The three variants of one seed, untrained. Tests copy what they change."""
    return {variant: train.build(variant, 3, TINY) for variant in VARIANTS}


def run(model, folder, preset=TINY, stop_at=None):
    model = copy.deepcopy(model)
    plan = loop.Plan(preset.steps, preset.warmup, preset.lr, batch_seed=7)
    record = loop.train(model, CORPUS, preset, plan, folder, stop_at=stop_at)
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
    assert len(corpus.train) > 4 * len(corpus.validation) > 400_000
    assert corpus.facts()["text"] == f"standard library of Python {sys.version.split()[0]}"


def test_a_python_without_sources_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="installed without its sources"):
        load_corpus(tmp_path)


def test_variants_start_alike_and_differ_only_by_their_reads(models):
    weights = models["original"].state_dict()
    for variant in ("block", "full"):
        states = models[variant].state_dict()
        assert all(torch.equal(states[name], weight) for name, weight in weights.items())
        assert {name.split(".")[-1] for name in states.keys() - weights.keys()} == {"query", "key_norm"}
        assert [proof.output_error for proof in models[variant].report.verify.proofs]
    streams = {variant: models[variant].report.streams[0] for variant in ("block", "full")}
    assert len(streams["block"].blocks) == TINY.blocks
    assert len(streams["full"].blocks) == streams["full"].num_updates == 2 * TINY.layers


def test_optimizer_decays_matrices_only(models):
    model = models["block"]
    decayed, vectors, reads = loop.optimizer_for(model, 1e-3, TINY).param_groups
    assert (decayed["weight_decay"], vectors["weight_decay"], reads["weight_decay"]) == (TINY.weight_decay, 0, 0)
    assert {id(p) for p in reads["params"]} == {id(p) for p in ar.attnres_parameters(model)}
    assert all(p.ndim == 2 for p in decayed["params"])
    groups = (decayed, vectors, reads)
    assert [group["scale"] for group in groups] == [1, 1, 1]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_reads_may_learn_at_another_rate(models, tmp_path):
    before = models["block"].state_dict()

    def moved(read_lr):
        model = copy.deepcopy(models["block"])
        plan = loop.Plan(1, 1, TINY.lr, batch_seed=7, read_lr=read_lr)
        loop.train(model, CORPUS, TINY, plan, tmp_path / str(read_lr))
        return {name: (value - before[name]).abs().max().item() for name, value in model.state_dict().items()}

    whole, quarter = moved(1.0), moved(0.25)
    # AdamW's first step is as long as its rate
    for name, far in whole.items():
        expected = far / 4 if name.split(".")[-1] in ("query", "key_norm") else far
        assert quarter[name] == pytest.approx(expected, abs=1e-6), name


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    plan = loop.Plan(steps=100, warmup=10, lr=2.0, batch_seed=0)
    rates = [loop.learning_rate(step, plan) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0) == max(rates)
    assert rates[54] == pytest.approx(1.1)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize("variant", ["original", "block", *READS])
def test_resumed_run_equals_an_uninterrupted_one(variant, models, tmp_path):
    model = models[variant] if variant in models else train.build(variant, 3, TINY)
    whole_model, whole = run(model, tmp_path / "whole")
    assert len(whole.train_loss) == TINY.steps
    assert whole.train_loss[-1] < whole.train_loss[0]

    _, half = run(model, tmp_path / "parts", stop_at=8)
    assert len(half.train_loss) == 8
    # a fresh process has other numbers in its generator
    torch.manual_seed(99)
    model, record = run(model, tmp_path / "parts")
    assert record.train_loss == whole.train_loss
    assert record.validation == whole.validation
    assert record.final_validation == whole.final_validation
    states = whole_model.state_dict()
    assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())


def test_checkpoint_of_another_run_is_refused(models, tmp_path):
    run(models["original"], tmp_path, stop_at=4)
    with pytest.raises(ValueError, match=r"of another run \(lr 0.004 there, 0.1 now\): give another --out"):
        run(models["original"], tmp_path, replace(TINY, lr=0.1))


def test_checkpoint_of_another_read_or_machine_is_refused(models, tmp_path, monkeypatch):
    run(models["block"], tmp_path)
    biased = train.build("recency_bias", 3, TINY)
    with pytest.raises(ValueError, match=r"of another run \(read .*recency_bias=0.0.* there, .*recency_bias=2.0"):
        run(biased, tmp_path)
    # a run that ended is not called one of today's torch
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"of another run \(torch .* there, 9.9 now\)"):
        run(models["block"], tmp_path)


def test_the_machine_of_a_run_is_that_of_its_preset(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert train.circumstances(CORPUS, TINY)["device"].endswith(f"CPU cores, {platform.machine()}")
    assert train.circumstances(CORPUS, PRESETS["gpu"])["device"] == "a GPU"


def test_validation_loss_is_the_mean_over_the_same_windows(models):
    model = models["original"]
    text = CORPUS.validation
    starts = [round(i * (len(text) - TINY.context - 1) / 4 - 0.499) for i in range(5)]
    losses = []
    for start in starts:
        ids = text[start : start + TINY.context + 1].long()
        chances = model(ids[None, :-1])[0].double().softmax(-1)
        losses += (-chances.log()[range(TINY.context), ids[1:]]).tolist()
    found = loop.validate(model, text, TINY, 5)
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_loss_that_is_not_finite_ends_the_run_and_keeps_it(models, tmp_path, capsys):
    preset = replace(TINY, lr=1e30, clip=1e30)
    _, record = run(models["original"], tmp_path, preset)
    assert record.ended
    assert "at step" in record.ended
    assert 1 <= len(record.train_loss) < preset.steps
    assert record.final_validation is None
    facts = record.facts()
    assert facts["train_loss"][-1] is None
    assert json.loads(json.dumps(facts, allow_nan=False))["train_loss"][0] > 0

    again = run(models["original"], tmp_path, preset)[1]
    assert again.ended == record.ended
    train.report(train.Console(), "original", record)
    assert "the run is kept" in capsys.readouterr().out.replace("\n", " ")


def test_final_loss_that_is_not_finite_is_no_result(models, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validate", lambda *given: float("nan"))
    _, record = run(models["original"], tmp_path / "tiny" / "original-3")
    assert record.ended == "the final validation loss is nan"
    assert json.loads(json.dumps(record.facts(), allow_nan=False))["final_validation"] is None
    with pytest.raises(
        ValueError, match=r"original-3 was not trained to the end, the final .* nan: leave its seed out"
    ):
        look._trained(tmp_path / "tiny" / "original-3", TINY)


def test_a_rate_at_which_a_retrofit_ended_early_has_no_figure():
    def losses(**by_variant):
        return {"final_validation": {name: {"by_seed": by_seed} for name, by_seed in by_variant.items()}}

    same = losses(original={"0": 2.0, "1": 3.0}, block={"0": 1.5, "1": 2.5}, gate={"0": 1.5, "1": 2.5})
    facts = {"retrofit": same, "retrofit_read_lr": {"16": losses(block={"0": 1.0})}}
    facts["retrofit_read_lr"]["64"] = losses(gate={"1": 2.0})
    rows = tables.retrofit_read_lr(facts).splitlines()[4:]
    assert rows == [
        "| x16 | Block | -1.0000 | - | -1.0000 |",
        "| x16 | Block, `gate=True` | - | - | - |",
        "| x64 | Block | - | - | - |",
        "| x64 | Block, `gate=True` | - | -1.0000 | -1.0000 |",
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The commands of the page on the tiny preset, one seed: their folder and the collected facts."""
    out = tmp_path_factory.mktemp("evidence")
    where = ["--preset", "tiny", "--seeds", "0", "--out", str(out)]
    search = ["--seeds", "9", "--variants", "original", "--steps", "4", "--out", str(out / "lr" / "x")]
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, retrofit, look):
            patch.setattr(module, "load_corpus", lambda: CORPUS)
        train.main(where)
        train.main([*where, "--variants", *READS])
        slower = ["--variants", "block", "full", "--read-lr", "0.25", "--out", str(out / "read_lr" / "x")]
        train.main(["--preset", "tiny", "--seeds", "0", *slower])
        started = ["--embedding-std", "1"]
        elsewhere = [str(out / "embedding_std" / "1"), str(out / "embedding_std" / "1" / "lr" / "x")]
        train.main(["--preset", "tiny", "--seeds", "0", *started, "--out", elsewhere[0]])
        train.main(["--preset", "tiny", *search[:-1], elsewhere[1], *started])
        retrofit.main([*where, "--variants", "original", "block", "recency_bias", "gate_and_bias"])
        retrofit.main([*where, "--variants", "gate_and_bias", "--read-lr", "4"])
        train.main(["--preset", "tiny", *search])
        look.main([*where, "--variants", "block", "--figures", str(out / "figures")])
    summarize.main(["--preset", "tiny", "--out", str(out), "--json", str(out / "all.json")])
    return out, json.loads((out / "all.json").read_text())


@pytest.mark.slow
def test_commands_of_the_page_run_end_to_end(trained):
    out, facts = trained
    runs = {run["variant"]: run for run in facts["training"]["runs"]}
    assert list(runs) == [*VARIANTS, *READS]
    for variant, one in runs.items():
        assert one == {name: json.loads((out / f"tiny/{variant}-0/result.json").read_text())[name] for name in one}
        assert len(one["train_loss"]) == TINY.steps
        assert [step for step, _ in one["validation"]] == [4, 8, 12]
        assert one["ended"] is None
    # zero queries: before the first step all variants are one function, but for the one that prefers a source
    first = {variant: one["train_loss"][0] for variant, one in runs.items()}
    assert {variant for variant, loss in first.items() if abs(loss - first["original"]) > 1e-5} <= {"recency_bias"}
    assert facts["corpus"] == CORPUS.facts()
    assert [search["steps"] for search in facts["lr_search"]] == [4]
    slower = {run["variant"]: run for run in facts["read_lr"]["0.25"]["runs"]}
    assert {(variant, one["read_lr"]) for variant, one in slower.items()} == {("block", 0.25), ("full", 0.25)}
    assert all(one["final_validation"] != runs[variant]["final_validation"] for variant, one in slower.items())
    larger = {run["variant"]: run for run in facts["embedding_std"]["1"]["runs"]}
    assert {(variant, one["embedding_std"]) for variant, one in larger.items()} == {(name, 1) for name in VARIANTS}
    assert all(one["final_validation"] != runs[variant]["final_validation"] for variant, one in larger.items())
    assert [search["steps"] for search in facts["embedding_std"]["1"]["lr_search"]] == [4]
    assert facts["throughput"] is None
    assert tables.throughput(facts) == "Not run."


def test_embeddings_may_start_larger_and_all_else_is_the_same():
    small, large = (train.original(3, TINY, *std).state_dict() for std in ((), (0.04,)))
    assert torch.equal(large.pop("tokens.weight"), 2 * small.pop("tokens.weight"))
    assert all(torch.equal(large[name], value) for name, value in small.items())


def test_bfloat16_run_follows_the_float32_run(models, tmp_path):
    _, exact = run(models["block"], tmp_path / "float32")
    _, rounded = run(models["block"], tmp_path / "bfloat16", replace(TINY, autocast=True))
    assert rounded.train_loss != exact.train_loss
    assert rounded.train_loss == pytest.approx(exact.train_loss, rel=1e-2)


@pytest.mark.slow
def test_compiled_bfloat16_run_follows_the_uncompiled_one(models, tmp_path):
    # what the preset "gpu" asks for, on what is here
    _, plain = run(models["full"], tmp_path / "plain", replace(TINY, autocast=True))
    _, compiled = run(models["full"], tmp_path / "compiled", replace(TINY, autocast=True, compile=True))
    assert compiled.final_validation == pytest.approx(plain.final_validation, rel=1e-2)
    assert compiled.train_loss == pytest.approx(plain.train_loss, rel=1e-2)


def test_throughput_times_all_variants_in_turns(models):
    rows = throughput.measure(copy.deepcopy(models), TINY, CORPUS, rounds=2)
    assert list(rows) == list(VARIANTS)
    assert rows["original"]["ratio"] == 1
    assert all(row["bytes_per_second"] == pytest.approx(1e3 * 4 * 16 / row["ms"], rel=1e-2) for row in rows.values())
    assert tables.throughput({"throughput": {"variants": rows}}).count("\n") == 1 + len(VARIANTS)


def test_a_step_on_a_gpu_is_timed_to_its_end(monkeypatch):
    seen = []
    monkeypatch.setattr(throughput, "_step_of", lambda *given: lambda: seen.append("step"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    throughput.measure({"original": None}, replace(TINY, device="cuda"), CORPUS, rounds=1)
    assert seen == ["wait", "step", "wait"] * (throughput.WARM_UP_ROUNDS + 1)


@pytest.mark.slow
def test_retrofit_starts_where_the_trained_model_was(trained):
    _, facts = trained
    pretrained = next(run for run in facts["training"]["runs"] if run["variant"] == "original")
    runs = {run["variant"]: run for run in facts["retrofit"]["runs"]}
    assert list(runs) == ["original", "block", "recency_bias", "gate_and_bias"]
    for one in runs.values():
        assert one["before_rewrite"] == pytest.approx(pretrained["final_validation"], abs=1e-6)
        assert len(one["train_loss"]) == TINY.retrofit_steps
    # a bias makes another function of it, but behind a gate
    other = runs.pop("recency_bias")
    assert other["after_rewrite"] != pytest.approx(other["before_rewrite"], abs=1e-3)
    for one in runs.values():
        assert one["after_rewrite"] == pytest.approx(one["before_rewrite"], abs=1e-6)
        assert one["train_loss"][0] == pytest.approx(runs["original"]["train_loss"][0], abs=1e-5)


@pytest.mark.slow
def test_retrofit_of_another_checkpoint_is_refused(trained, tmp_path):
    out, _ = trained
    pretrained = tmp_path / "original-0"
    shutil.copytree(out / "tiny" / "original-0", pretrained)
    state = torch.load(pretrained / "checkpoint.pt", weights_only=True)
    state["record"]["final_validation"] += 1
    torch.save(state, pretrained / "checkpoint.pt")
    folder = out / "tiny" / "retrofit-original-0"
    with pytest.raises(ValueError, match=r"is of another run \(started_at "):
        retrofit.continue_variant("original", 0, TINY, CORPUS, pretrained, folder, train.Console())


@pytest.mark.slow
def test_retrofit_at_another_rate_is_kept_apart(trained):
    _, facts = trained
    (faster,) = facts["retrofit_read_lr"]["4"]["runs"]
    same = next(run for run in facts["retrofit"]["runs"] if run["variant"] == "gate_and_bias")
    assert (faster["variant"], faster["read_lr"], same["read_lr"]) == ("gate_and_bias", 4, 1)
    assert faster["read"] == {"gate": True, "recency_bias": 2.0}
    assert faster["train_loss"][0] == same["train_loss"][0]
    assert faster["final_validation"] != same["final_validation"]
    assert "x4" not in tables.read_lr(facts)
    assert tables.retrofit_read_lr(facts).count("`gate=True`, `recency_bias=2.0`") == 2


@pytest.mark.slow
def test_look_gives_facts_and_figures(trained):
    out, facts = trained
    found = facts["look"]
    assert found["dynamics"].keys() == {"original", "block"}
    diagnosis = ar.Diagnosis.load(out / "tiny" / "block-0" / "diagnosis.json")
    updates = diagnosis.streams[0].updates
    ratio = found["dynamics"]["block"]["update_last_to_first"]
    assert ratio["by_seed"]["0"] == pytest.approx(updates[-1].output_rms / updates[0].output_rms, abs=1e-6)
    norms = torch.tensor([update.baseline_gradient_norm for update in updates], dtype=torch.float64)
    expected = norms.std(correction=0) / norms.mean()
    assert found["dynamics"]["original"]["gradient_variation"]["mean"] == pytest.approx(float(expected), abs=1e-6)
    # 2 layers: the reads before attention are of state 2, those before an MLP of states 1 and 3
    weights = {read.state: read.weights for read in diagnosis.streams[0].reads}
    pattern = {name: row["mean"] for name, row in found["maps"]["block"].items()}
    assert pattern["newest_before_attention"] == pytest.approx(weights[2][-1], abs=1e-6)
    assert pattern["embedding_before_mlp"] == pytest.approx((weights[1][0] + weights[3][0]) / 2, abs=1e-6)
    assert {path.suffix for path in (out / "figures" / "evidence_block").iterdir()} == {".svg"}


@pytest.mark.slow
def test_runs_that_do_not_compare_are_refused(trained, tmp_path):
    out, _ = trained
    for variant in ("original", "block"):
        facts = json.loads((out / f"tiny/{variant}-0/result.json").read_text())
        facts["torch"] = variant
        train.write_json(tmp_path / "tiny" / f"{variant}-0" / "result.json", facts)
    with pytest.raises(ValueError, match="2 values of torch"):
        summarize.collect(tmp_path, "tiny")
    facts |= {"torch": "original", "read_lr": 0.5}
    train.write_json(tmp_path / "tiny" / "block-0" / "result.json", facts)
    with pytest.raises(ValueError, match=r"were made with --read-lr \[0\.5, 1\.0\]"):
        summarize.collect(tmp_path, "tiny")
    facts |= {"read_lr": 1.0, "embedding_std": 1.0}
    train.write_json(tmp_path / "tiny" / "block-0" / "result.json", facts)
    with pytest.raises(ValueError, match=r"were made with --embedding-std \[0\.02, 1\.0\]"):
        summarize.collect(tmp_path, "tiny")
    with pytest.raises(FileNotFoundError, match=r"train\.py makes them"):
        summarize.collect(tmp_path / "none", "tiny")


def test_comparison_is_paired_by_seed_and_leaves_out_what_did_not_end():
    made = {("original", 0): 2.0, ("original", 1): 3.0, ("block", 0): 1.5, ("block", 1): 2.9, ("full", 0): None}
    made |= {("gate", 0): 1.75, ("gate", 1): 2.8}
    runs = [
        {"variant": variant, "seed": seed, "final_validation": loss, "ended": None if loss else "the loss is nan"}
        for (variant, seed), loss in made.items()
    ]
    found = summarize.compare(runs)
    assert found["final_validation"]["original"] == {"by_seed": {"0": 2.0, "1": 3.0}, "mean": 2.5, "sd": 0.707107}
    assert found["difference_to_original"]["block"]["mean"] == -0.3
    assert found["difference_to_original"]["block"]["by_seed"] == {"0": -0.5, "1": -0.1}
    assert found["difference_to_block"] == {"gate": {"by_seed": {"0": 0.25, "1": -0.1}, "mean": 0.075, "sd": 0.247487}}
    assert "full" not in found["final_validation"]
    assert found["left_out"] == ["full, seed 0: the loss is nan"]
    assert "Left out: full, seed 0: the loss is nan." in tables.losses({"training": found})
    # each table has its own variants
    assert "gate" not in tables.losses({"training": found}) + tables.differences({"training": found})
    assert "Left out" not in tables.read_variants({"training": found})
    assert tables.read_variant_differences({"training": found}).splitlines()[2:] == [
        "| Block, `gate=True` | +0.2500 | -0.1000 | +0.0750 | 0.2475 |"
    ]


def test_tables_of_the_page_equal_the_results():
    page, facts = PAGE.read_text(), json.loads(RESULTS.read_text())
    assert summarize.with_tables(page, facts) == page
    assert {found[1] for found in re.finditer(r"<!-- table: (\w+) -->", page)} == set(tables.TABLES)
    # a figure outside of the tables could not be made again
    prose = re.sub(r"<!-- table.*?<!-- end -->", "", page, flags=re.DOTALL).replace("arXiv 2603.15031", "")
    assert re.findall(r"\d\.\d", prose) == []
    # and a changed result changes the page
    facts["training"]["final_validation"]["block"]["mean"] += 0.01
    assert summarize.with_tables(page, facts) != page


def test_results_are_those_of_the_preset():
    facts = json.loads(RESULTS.read_text())
    assert facts["preset"] == PRESETS["cpu"].facts()
    for name in ("training", "retrofit"):
        again = summarize.compare(facts[name]["runs"])
        assert again == facts[name]


def test_results_say_which_read_was_trained():
    facts = json.loads(RESULTS.read_text())
    runs = facts["training"]["runs"]
    for run in (*runs, *facts["retrofit"]["runs"]):
        assert (run["read"], run["read_lr"]) == (fields_of(run["variant"]), 1)
    for rate, found in (*facts["read_lr"].items(), *facts["retrofit_read_lr"].items()):
        assert {run["read_lr"] for run in found["runs"]} == {float(rate)}
    for std, found in facts["embedding_std"].items():
        assert {(run["read_lr"], run["embedding_std"]) for run in found["runs"]} == {(1, float(std))}
    assert {(run["variant"], run["seed"]) for run in runs} == set(product([*VARIANTS, *READS], range(3)))


def test_page_with_a_wrong_mark_is_refused():
    with pytest.raises(ValueError, match="asks for a table 'lossy'"):
        summarize.with_tables("<!-- table: lossy -->\n<!-- end -->", {})
    with pytest.raises(ValueError, match="1 starts of a table and 0 ends"):
        summarize.with_tables("<!-- table: losses -->", {})


def test_presets_are_deep():
    assert PRESETS["cpu"].layers >= 12
    assert PRESETS["gpu"].layers >= 16
    assert config_of("original", TINY) is None
    assert config_of("full", TINY).num_blocks == "full"


def test_variants_of_the_read_are_block_with_one_field_more():
    assert set(READS) == {"gate", "num_heads", "key_rank", "recency_bias"}
    block = config_of("block", TINY)
    for name in READS:
        config = config_of(name, TINY)
        assert getattr(config, name) != getattr(block, name)
        assert replace(config, **{name: getattr(block, name)}) == block
