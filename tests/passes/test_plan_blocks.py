"""Mirrors attnres_rewrite/passes/plan_blocks.py."""

import pytest

from attnres_rewrite.capture import capture
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import UnpreservedReadError
from attnres_rewrite.passes.find_stream import find_stream
from attnres_rewrite.passes.normalize_adds import normalize_adds
from attnres_rewrite.passes.plan_blocks import plan_blocks
from attnres_rewrite.records import BlockPlan
from tests.networks import gpt, gpt_of, ids


@pytest.fixture(scope="module")
def five_layers():
    gm = capture(gpt(depth=5), (ids(),), both_modes=False).programs[False]
    normalize_adds(gm)
    return gm.graph, find_stream(gm).streams


def plan_of(stream, **config: object) -> BlockPlan:
    graph, streams = stream
    (plan,) = plan_blocks(graph, streams, AttnResConfig(**config))
    return plan


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        pytest.param({}, [2, 1, 1, 1, 2, 1, 1, 1], id="default is min(8, updates), as equal as they can be"),
        pytest.param({"num_blocks": 1}, [10], id="one block"),
        pytest.param({"num_blocks": 5}, [2] * 5, id="even"),
        pytest.param({"num_blocks": 4}, [3, 2, 3, 2], id="uneven"),
        pytest.param({"num_blocks": "full"}, [1] * 10, id="full"),
        pytest.param({"num_blocks": 10}, [1] * 10, id="as many as updates"),
        pytest.param({"block_size": 4}, [4, 4, 2], id="short last block"),
        pytest.param({"block_size": 99}, [10], id="block larger than the stream"),
        pytest.param({"block_layers": 2}, [4, 4, 2], id="layers"),
    ],
)
def test_blocks_cover_the_updates_once(five_layers, config, sizes):
    blocks = plan_of(five_layers, **config).blocks
    assert [len(block) for block in blocks] == sizes
    assert [update for block in blocks for update in block] == list(range(1, 11))


def test_reads_know_their_sources_and_their_owner(five_layers):
    plan = plan_of(five_layers, block_size=4)
    assert [(read.state, read.num_sources, read.name) for read in plan.reads] == [
        (1, 2, "layers.0.attn_res.0"),
        (2, 2, "layers.1.attn_res.0"),
        (3, 2, "layers.1.attn_res.1"),
        (4, 2, "layers.2.attn_res.0"),
        (5, 3, "layers.2.attn_res.1"),
        (6, 3, "layers.3.attn_res.0"),
        (7, 3, "layers.3.attn_res.1"),
        (8, 3, "layers.4.attn_res.0"),
        (9, 4, "layers.4.attn_res.1"),
        (10, 4, "attn_res.0"),
    ]
    assert all("networks.py:" in read.source_line for read in plan.reads)


def test_more_blocks_than_updates_is_a_wrong_argument(five_layers):
    with pytest.raises(ValueError, match="num_blocks=11 is more than the 10 updates of stream"):
        plan_of(five_layers, num_blocks=11)


def streams_of(model):
    gm = capture(model, (ids(),), both_modes=False).programs[False]
    normalize_adds(gm)
    return gm.graph, find_stream(gm).streams


def test_parallel_branches_share_one_read():
    found = streams_of(gpt_of(lambda s, x: x + s.f(s.n1(x)) + s.g(s.n2(x))))
    assert [(read.state, read.num_sources) for read in plan_of(found, block_size=3).reads] == [(2, 2), (4, 3)]


def test_mean_refuses_a_reader_of_the_scale_and_sum_takes_it():
    found = streams_of(gpt_of(lambda s, x: x + s.f(x)))
    with pytest.raises(UnpreservedReadError, match="linear at") as refusal:
        plan_of(found, output="mean")
    assert "state 1 of stream" in str(refusal.value)
    assert 'Use output="sum"' in str(refusal.value)
    assert len(plan_of(found, output="sum").reads) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide the 16 channels of stream"),
        ({"num_heads": 32}, "num_heads=32 does not divide the 16 channels of stream"),
        ({"key_rank": 17}, "key_rank=17 is more than the 16 channels of stream"),
    ],
)
def test_variants_that_do_not_fit_the_width(five_layers, config, message):
    with pytest.raises(ValueError, match=message):
        plan_of(five_layers, **config)
