"""Mirrors attnres_rewrite/diagnosis.py: a diagnosis and its file."""

import json
from dataclasses import replace

import pytest
import torch

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.diagnosis import Diagnosis, ReadDiagnosis, StreamDiagnosis, UpdateDiagnosis
from attnres_rewrite.errors import ArtifactError

READ = ReadDiagnosis("attn_res.0", 2, "", "mlp", ("embedding", "partial"), (0.1, 0.9), (0.01, 1 / 3), 0.3, 1.4, 2.0)
UPDATE = UpdateDiagnosis(1, "layers.0.f", "", 1, None, 0.1, 0.2, None, 1e-12, 0.3, 0.4, None, 0.5)
STREAM = StreamDiagnosis("stream", 8, 10, ((1, 1), (2, 2)), 1.0, 1.5, (READ,), (UPDATE, replace(UPDATE, index=2)))
CONFIG = AttnResConfig(num_blocks=2, gate=True, param_dtype=torch.float32)
DIAGNOSIS = Diagnosis("Tiny", "eval", 3, 1, (2,), 2.5, "given", 2.75, (STREAM,), CONFIG, "default")
(STREAM_FACTS,) = DIAGNOSIS.to_dict()["streams"]
(READ_FACTS,) = STREAM_FACTS["reads"]


@pytest.mark.parametrize("one", [DIAGNOSIS, replace(DIAGNOSIS, loss=None, baseline_loss=None, streams=())])
def test_a_file_gives_back_what_was_saved(one, tmp_path):
    path = one.save(tmp_path / "one.json")
    assert Diagnosis.load(path) == one
    assert json.loads(path.read_text()) == one.to_dict()
    assert Diagnosis.from_dict(one.to_dict()) == one


def test_it_is_printed_in_a_line_for_each_stream():
    head = "Tiny: eval mode, 3 batches, 10 tokens; loss 2.5000, of the original 2.7500"
    figures = "1 read of 1.4 to 1.4 effective sources, 2 updates of rms 0.1 to 0.1, gradient norms 1e-12 to 1e-12"
    assert str(DIAGNOSIS) == f"{head}\n  stream: {figures}"
    failed = replace(DIAGNOSIS, loss=None, baseline_loss=None, streams=(), num_batches=1)
    assert str(failed) == "Tiny: eval mode, 1 batch, 0 tokens; no finite loss"


def test_tokens_are_those_of_all_streams():
    assert replace(DIAGNOSIS, streams=(STREAM, STREAM)).num_tokens == 20
    assert DIAGNOSIS.to_dict()["num_tokens"] == 10


def test_a_file_is_replaced_when_asked(tmp_path):
    path = DIAGNOSIS.save(tmp_path / "one.json")
    other = replace(DIAGNOSIS, loss=1.0)
    with pytest.raises(ArtifactError, match=r"the file exists, at .*one\.json"):
        other.save(path)
    assert Diagnosis.load(other.save(path, force=True)) == other


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"the file cannot be written, at .*nowhere"):
        DIAGNOSIS.save(tmp_path / "nowhere" / "one.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": 3}, "the diagnosis has format 3; this release reads 1 and 2"),
        ({"format": "other"}, "not a diagnosis"),
        ({"streams": [{"name": "stream"}]}, "the diagnosis cannot be read"),
        ({"surprise": 1}, "the diagnosis cannot be read"),
        ({"streams": [STREAM_FACTS | {"reads": [READ_FACTS | {"weights": ["a", "b"]}]}]}, "float: 'a'"),
        ({"streams": [STREAM_FACTS | {"reads": [READ_FACTS | {"weights": [1.0]}]}]}, "has 2 sources, 1 weights"),
        ({"config": {"surprise": 1}}, "the diagnosis cannot be read"),
        ({"config": {"num_blocks": -1}}, "the diagnosis cannot be read"),
    ],
)
def test_what_is_no_diagnosis_of_this_release_is_refused(change, says):
    with pytest.raises(ArtifactError, match=says):
        Diagnosis.from_dict(DIAGNOSIS.to_dict() | change)


def test_a_file_of_format_1_says_neither_config_nor_loss(tmp_path):
    facts = DIAGNOSIS.to_dict() | {"format_version": 1}
    del facts["config"], facts["loss_kind"]
    assert Diagnosis.from_dict(facts) == replace(DIAGNOSIS, config=None, loss_kind="")


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "one.json").write_text("{")
    (tmp_path / "nan.json").write_text(json.dumps(DIAGNOSIS.to_dict() | {"loss": float("nan")}))
    for name in ("one.json", "nan.json", "none.json"):
        with pytest.raises(ArtifactError, match=f"not a diagnosis, at .*{name}"):
            Diagnosis.load(tmp_path / name)
