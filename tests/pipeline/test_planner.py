"""Routes against closed forms, against brute force, and against a replay that only knows what a rank has seen."""

import itertools
import random

import pytest

from attnres_rewrite.pipeline.planner import MODES, Value, plan_routes, ranks_of_stages, traffic_of


def blocks(num_stages, per_stage=1, num_bytes=1):
    """A block a stage, read in every later stage: what Block Attention Residuals make."""
    return [
        Value(f"b{stage}.{number}", stage, frozenset(range(stage + 1, num_stages)), num_bytes)
        for stage in range(num_stages - 1)
        for number in range(per_stage)
    ]


def formula(mode, p, v):
    """arXiv 2603.15031, section 4.2, and the exact minimum, in blocks of one stage."""
    c = p * v
    return {
        "naive": c * (c - 1) // 2,
        "paper": p * (p - 1) // 2 + (v - 1) * p * p,
        "exact": p * (p - 1) * (2 * v - 1) // 2,
    }[mode]


def test_ranks():
    assert ranks_of_stages(3, 2, "loop") == (0, 1, 2, 0, 1, 2)
    assert ranks_of_stages(3, 2, "v") == (0, 1, 2, 2, 1, 0)
    assert ranks_of_stages(2, 3, "v") == (0, 1, 1, 0, 0, 1)


@pytest.mark.parametrize("mode", MODES)
def test_totals_are_the_closed_forms(mode):
    for p, v in itertools.product(range(2, 9), range(1, 6)):
        for per_stage in (1, 3):
            traffic = traffic_of(blocks(p * v, per_stage), ranks_of_stages(p, v, "loop"), mode)
            assert traffic.total_units == per_stage * formula(mode, p, v), (p, v)
            peak = {"naive": p * v - 1, "paper": p if v > 1 else p - 1, "exact": p - 1}[mode]
            assert max(traffic.per_hop_units) == per_stage * peak


@pytest.mark.parametrize("mode", MODES)
def test_one_virtual_stage_needs_no_store(mode):
    traffic = traffic_of(blocks(4), ranks_of_stages(4, 1, "loop"), mode)
    assert traffic.per_hop_units == (1, 2, 3)
    assert traffic.held_bytes == (0, 0, 0, 0)


def test_a_v_has_one_free_hop():
    ranks = ranks_of_stages(4, 2, "v")
    assert traffic_of(blocks(8), ranks, "exact").per_hop_units == (1, 2, 3, 0, 2, 4, 6)
    assert traffic_of(blocks(8), ranks, "exact").total_units == formula("exact", 4, 2)


def test_bytes_and_what_is_held():
    values = [Value("root", 0, frozenset({1, 2, 3}), 10), Value("partial", 1, frozenset({2}), 7)]
    traffic = traffic_of(values, ranks_of_stages(2, 2, "loop"), "exact")
    # the root goes to rank 1 once; both ranks keep it for their second stage; the partial sum goes back
    assert traffic.per_hop_units == (1, 1, 0)
    assert traffic.per_hop_bytes == (10, 7, 0)
    assert traffic.held_bytes == (10, 10)


def random_case(seed):
    draw = random.Random(seed)
    p, v = draw.randint(1, 5), draw.randint(1, 4)
    count = p * v
    ranks = draw.choice(
        [ranks_of_stages(p, v, "loop"), ranks_of_stages(p, v, "v"), tuple(draw.randrange(p) for _ in range(count))]
    )
    values = []
    for number in range(draw.randint(1, 6)):
        if count < 2:
            break
        made = draw.randrange(count - 1)
        later = range(made + 1, count)
        readers = frozenset(draw.sample(later, draw.randint(1, len(later))))
        values.append(Value(f"v{number}", made, readers, draw.randint(1, 9), draw.random() < 0.8))
    return values, ranks


def replay(values, ranks, mode):
    """Play the plan forward and backward for one microbatch; a value is only where it was brought."""
    stages = plan_routes(values, ranks, mode)
    store, wire = {}, {}
    for stage in stages:
        at_hand = dict.fromkeys(stage.made, stage.stage)
        for name in stage.received:
            assert wire.pop((stage.stage, name)), "received what nobody sent"
            at_hand[name] = stage.stage
        for name in stage.cached:
            assert (stage.rank, name, stage.owners[name]) in store
        read = {value.name for value in values if stage.stage in value.readers}
        assert read <= {*stage.received, *stage.cached}
        for name in stage.kept:
            assert name in at_hand
            store[stage.rank, name, stage.stage] = True
        for name in stage.sent:
            assert name in at_hand or (stage.rank, name, stage.owners[name]) in store
            wire[stage.stage + 1, name] = True
        for name, owner in stage.dropped:
            del store[stage.rank, name, owner]
    assert not store, "something is never dropped"
    assert not wire
    return stages


def replay_backward(values, stages):
    """Hand gradients back from the last stage, one for each reader; each maker must get those of all its readers."""
    wire, handed_in = {}, {}

    def hand_in(name, owner, gradients):
        count, total = handed_in.get((name, owner), (0, 0))
        handed_in[name, owner] = count + 1, total + gradients

    def collect(stage, name):
        count, total = handed_in.pop((name, stage.stage), (0, 0))
        assert count == stage.deposits[name]
        return total

    for stage in reversed(stages):
        for value in values:
            name, reads = value.name, stage.stage in value.readers
            if name not in stage.owners or not value.has_gradient:
                continue
            returned = wire.pop((stage.stage + 1, name)) if name in stage.sent else 0
            if name in stage.made:
                assert returned + collect(stage, name) == len(value.readers)
                continue
            if name in stage.sent:
                hand_in(name, stage.owners[name], returned)
            if name in stage.cached:
                hand_in(name, stage.owners[name], 1)
            if name in stage.received:
                wire[stage.stage, name] = reads + collect(stage, name)
    assert not wire
    assert not handed_in


@pytest.mark.parametrize("mode", MODES)
def test_random_plans_bring_every_value_to_its_readers_and_every_gradient_back(mode):
    for seed in range(1000):
        values, ranks = random_case(seed)
        replay_backward(values, replay(values, ranks, mode))


def least_hops(value, ranks):
    """Return the fewest hops between ranks by which a value reaches its readers, over every subset of hops."""
    hops = range(value.made, len(ranks) - 1)
    for count in range(len(hops) + 1):
        for chosen in itertools.combinations(hops, count):
            have = {ranks[value.made]}
            for hop in hops:
                if hop in chosen:
                    if ranks[hop] not in have:
                        break
                    have.add(ranks[hop + 1])
                if hop + 1 in value.readers and ranks[hop + 1] not in have:
                    break
            else:
                return count
    raise AssertionError


def test_exact_is_the_least_there_is():
    draw = random.Random(0)
    for _ in range(300):
        p, v = draw.randint(2, 4), draw.randint(1, 3)
        ranks = ranks_of_stages(p, v, "loop")
        made = draw.randrange(len(ranks) - 1)
        later = range(made + 1, len(ranks))
        value = Value("v", made, frozenset(draw.sample(later, draw.randint(1, len(later)))), 1)
        exact, paper, naive = (traffic_of([value], ranks, mode).total_units for mode in ("exact", "paper", "naive"))
        assert exact == least_hops(value, ranks)
        assert exact <= paper <= naive


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ranks_of_stages(0, 2, "loop"), "at least 1"),
        (lambda: ranks_of_stages(2, 2, "ring"), "'loop' or 'v'"),
        (lambda: plan_routes(blocks(2), (0, 1), "best"), "'naive', 'paper', 'exact'"),
        (
            lambda: plan_routes([Value("v", 1, frozenset({1}), 1)], (0, 1), "exact"),
            r"stage 1 and read in \[1\]",
        ),
        (lambda: plan_routes([Value("v", 0, frozenset({2}), 1)], (0, 1), "exact"), r"read in \[2\]"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
