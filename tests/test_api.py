"""Mirrors attnres_rewrite/api.py: the flow as a whole, its report, and the refusals that belong to no stage."""

import json

import pytest
import torch
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite import functional
from attnres_rewrite.report import report_from_dict
from tests.networks import Gpt, Layer, gpt, ids


def test_the_report_says_what_was_found_planned_and_proved():
    stages: list[str] = []
    new = ar.rewrite(gpt(), (ids(),), config=ar.AttnResConfig(block_size=4), progress=stages.append)
    report = new.report
    (stream,) = report.streams
    assert (stream.name, stream.width, stream.dtype, stream.num_updates) == ("stream", 16, "float32", 6)
    assert stream.blocks == ((1, 4), (5, 6))
    assert [(read.state, read.num_sources) for read in stream.reads] == [
        (1, 2),
        (2, 2),
        (3, 2),
        (4, 2),
        (5, 3),
        (6, 3),
    ]
    assert stream.reads[0].owner == "layers.0"
    assert stream.reads[0].query_name == "layers.0.attn_res.0.query"
    assert stream.reads[-1].query_name == "attn_res.0.query"
    assert stream.update_kinds == {"residual": 6}
    assert len(report.left_alone) == 6
    assert report.model == "Gpt"
    assert report.verify.passed
    assert stages[0] == "capture (eval)"
    assert any(stage.startswith("prove:") for stage in stages)


def test_proofs_are_no_calls_of_plain_pytorch():
    """They run in float64, for which there is no kernel; on a GPU each counted call is warned of."""
    functional.reset_launches()
    new = ar.rewrite(gpt(), (ids(),))
    assert ar.verify(new).passed
    assert functional.launches() == {}


def test_the_report_goes_through_json_and_back():
    report = ar.rewrite(gpt(depth=2), (ids(),)).report
    facts = json.loads(json.dumps(report.to_dict()))
    assert facts["verify"]["passed"] is True
    assert report_from_dict(facts) == report


def test_inspect_finds_the_same_and_changes_nothing():
    model = gpt(dropout=0.1)
    before = list(model.state_dict())
    report = ar.inspect(model, (ids(),), config=ar.AttnResConfig(block_size=4))
    new = ar.rewrite(model, (ids(),), config=ar.AttnResConfig(block_size=4), verify=False)
    assert report.streams == new.report.streams
    assert report.verify is None
    assert list(model.state_dict()) == before
    assert not any("attn_res" in name for name, _ in model.named_parameters())


def test_inspect_works_on_meta_tensors():
    with torch.device("meta"):
        model = Gpt(depth=4)
    report = ar.inspect(model, (torch.zeros(2, 5, dtype=torch.long, device="meta"),))
    assert report.streams[0].num_updates == 8


def test_a_half_precision_model_is_rewritten_with_float32_queries():
    new = ar.rewrite(gpt().to(torch.bfloat16), (ids(),))
    assert new.report.verify.passed
    assert {value.dtype for name, value in new.named_parameters() if "attn_res" in name} == {torch.float32}
    assert new(ids()).dtype == torch.bfloat16


def test_param_dtype_and_float64_models():
    new = ar.rewrite(gpt().double(), (ids(),), verify=False)
    assert {value.dtype for _, value in new.named_parameters()} == {torch.float64}
    new = ar.rewrite(gpt(), (ids(),), config=ar.AttnResConfig(param_dtype=torch.bfloat16))
    assert {value.dtype for name, value in new.named_parameters() if "attn_res" in name} == {torch.bfloat16}


class DroppedSum(Gpt):
    """A dropout on the running sum itself: it ends the stream in train mode."""

    def __init__(self) -> None:
        super().__init__(depth=3)
        self.on_sum = nn.Dropout(0.2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = self.on_sum(layer(x))
        return self.norm(x)


def test_modes_with_different_streams_are_refused():
    with pytest.raises(ar.ModeMismatchError, match="the sum passes through dropout"):
        ar.rewrite(DroppedSum().eval(), (ids(),))


class Odd(Gpt):
    """Not deterministic: every call adds other noise, from no generator that a seed reaches."""

    calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            Odd.calls += 1
        return super().forward(ids) * (1 + Odd.calls)


def test_a_capture_that_is_not_the_model_is_refused():
    with pytest.raises(ar.ProofError, match="capture"):
        ar.rewrite(Odd(depth=2).eval(), (ids(),))


def test_a_model_with_attention_residuals_of_its_own_is_refused():
    class BlockAttnRes(Layer):
        pass

    model = Gpt(depth=2, block=lambda: BlockAttnRes(lambda s, x: x + s.f(s.n1(x))))
    with pytest.raises(ar.AlreadyRewrittenError, match="Attention Residuals of its own"):
        ar.rewrite(model, (ids(),))


def test_import_needs_no_optional_library():
    import subprocess
    import sys

    hidden = "import sys; sys.modules.update(dict.fromkeys(['triton', 'transformers', 'rich', 'typer']))"
    code = f"{hidden}\nimport attnres_rewrite"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
