"""A hand-made report whose every name tries to break out of the page."""

import pytest

from attnres_rewrite.records import FixedDim, LeftAlone, ReadGroup
from attnres_rewrite.report import CaptureReport, Proof, ReadReport, RewriteReport, StreamReport, VerifyReport

HOSTILE = '<script>alert("x")</script>&amp;\'</style>'


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture
def report() -> RewriteReport:
    """Two reads of width 8 in float32, so that a row has 32 bytes."""
    reads = (
        ReadReport(1, f"layers.1{HOSTILE}", f"{HOSTILE}.py:12", 2, f"{HOSTILE}.query", "two_phase", ("add",), HOSTILE),
        ReadReport(3, "", "", 3, "attn_res.0.query", "direct", (), "it is a direct read"),
    )
    groups = (
        ReadGroup((f"layers.1{HOSTILE}.attn_res.0",), 1, 1, "two_phase", 704, 512),
        ReadGroup(("attn_res.0",), 3, 0, "direct", 640, 992),
    )
    stream = StreamReport(HOSTILE, 8, "float32", 3, {"residual": 3}, ((1, 2), (3, 3)), reads, groups, HOSTILE)
    proofs = (
        Proof("original", "eval", "float64", 1.5e-15, None, 1, 0, 1e-10),
        Proof("independent", "eval", "float64", 0.0, 2.5e-15, 1, 7, 1e-10),
    )
    return RewriteReport(
        model=HOSTILE,
        config={"num_blocks": 2, "key_norm": True, "param_dtype": None, "output": HOSTILE},
        capture=CaptureReport(HOSTILE, ("eval",), 42, (FixedDim(HOSTILE, 1, 5),), 0.25, (HOSTILE,)),
        streams=(stream,),
        left_alone=(
            LeftAlone("add_1", f"{HOSTILE}.py:3", HOSTILE, HOSTILE),
            LeftAlone("add_2", "tiny.py:4", "layers.0", "adds integers"),
        ),
        num_parameters_added=32,
        pass_seconds=0.01,
        verify=VerifyReport(proofs, (HOSTILE,)),
    )
