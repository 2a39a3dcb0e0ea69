"""The dynamic programme against every way to cut."""

import itertools
import random

import pytest

from attnres_rewrite.errors import PartitionError
from attnres_rewrite.pipeline.cuts import Candidate, balanced_cuts


def places(seconds, num_open):
    return [Candidate(None, crossing, cost) for cost, crossing in zip(seconds, num_open, strict=True)]


def best_of_all(given, last, num_stages, allowed):
    costs = [place.seconds for place in given] + [last]
    results = []
    for cuts in itertools.combinations(allowed, num_stages - 1):
        edges = [0, *(cut + 1 for cut in cuts), len(costs)]
        slowest = max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))
        results.append((slowest, sum(given[cut].num_open for cut in cuts)))
    return min(results)


@pytest.mark.parametrize("at_block_ends", [False, True])
def test_it_is_the_best_of_all(at_block_ends):
    draw = random.Random(0)
    for _ in range(300):
        count = draw.randint(2, 9)
        given = places([draw.randint(1, 6) for _ in range(count)], [draw.randint(0, 1) for _ in range(count)])
        allowed = [n for n, place in enumerate(given) if not (at_block_ends and place.num_open)]
        num_stages, last = draw.randint(1, len(allowed) + 1), draw.randint(1, 6)
        chosen = balanced_cuts(given, last, num_stages, at_block_ends=at_block_ends)
        indices = [next(n for n, place in enumerate(given) if place is cut) for cut in chosen]
        assert indices == sorted(set(indices))
        assert set(indices) <= set(allowed)
        costs = [place.seconds for place in given] + [last]
        edges = [0, *(index + 1 for index in indices), len(costs)]
        slowest = max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))
        crossing = sum(given[index].num_open for index in indices)
        assert (slowest, crossing) == best_of_all(given, last, num_stages, allowed)


def test_equal_times_prefer_ends_of_blocks():
    given = places([1, 1, 1, 1], [1, 0, 1, 0])
    (cut,) = balanced_cuts(given, 1, 2)
    # 2 | 3 or 3 | 2: the place behind two has no open block
    assert given.index(cut) == 1


# Once wrong: three sums crossed, as equal stages differ by what rounding leaves
def test_times_that_are_equal_but_for_rounding_prefer_ends_of_blocks():
    given = places([0.1] * 23, [1, 0] * 11 + [1])
    chosen = balanced_cuts(given, 0.25, 8)
    assert [place.num_open for place in chosen] == [0] * 7


def test_too_few_ends_of_blocks():
    with pytest.raises(PartitionError, match="there are 1 ends of blocks"):
        balanced_cuts(places([1, 1], [1, 0]), 1, 3, at_block_ends=True)
