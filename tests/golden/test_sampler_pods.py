"""PODS: subsets of largest variance, by hand and by trying all subsets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from sampler_made import credit_of, frequency

from msgrpo_lab.sampler.pods import PODS, draw_max_variance, max_variance_inclusion, max_variance_lows


def best_variance(value, size):
    return max(np.var(value[list(subset)]) for subset in combinations(range(len(value)), size))


@pytest.mark.parametrize(
    ("value", "size", "subsets"),
    [
        ([0, 0.4, 1], 2, [[0, 1]]),  # the two ends
        ([0, 0, 0, 1], 2, [[0, 1]]),  # half zeros, half ones
        ([0, 0, 0, 1], 3, [[0, 0, 1]]),
        ([0, 0, 1, 1], 3, [[0, 1, 1], [0, 0, 1]]),  # variance 2/9 each
        ([0, 0, 0, 0, 1, 1, 1], 5, [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]),  # 6/25 each
        ([-2, 0, 1, 3], 3, [[-2, 1, 3], [-2, 0, 3]]),  # 14/3 − (2/3)² = 13/3 − (1/3)² = 38/9
        ([-2, 0, 2, 3], 3, [[-2, 2, 3]]),  # 17/3 − 1 = 42/9; {−2, 0, 3}: 38/9
        ([5, 5, 5], 2, [[5, 5]]),
        ([1, 2, 9], 1, [[9], [1]]),  # one value has no variance: either end
    ],
)
def test_the_subsets_of_largest_variance(value, size, subsets):
    value = np.array(value, dtype=float)
    lows = max_variance_lows(value, size)
    assert [[*value[:low], *value[value.size - size + low :]] for low in lows] == subsets


@pytest.mark.parametrize(
    ("value", "size", "inclusion"),
    [
        ([0.4, 1, 0], 2, [0, 1, 1]),
        ([0, 1, 0, 0], 2, [1 / 3, 1, 1 / 3, 1 / 3]),
        ([1, 0, 0, 1], 3, [3 / 4] * 4),  # {0, 1, 1} and {0, 0, 1} alike
        ([5, 5, 5], 2, [2 / 3] * 3),
        ([9, 1, 2], 1, [1 / 2, 1 / 2, 0]),
        ([3, 1, 2], 3, [1, 1, 1]),
        ([3, 1, 2], 0, [0, 0, 0]),
        # 12 failures, 4 successes of 16, eight drawn: all successes and 4 of 12 failures.
        ([0] * 12 + [1] * 4, 8, [1 / 3] * 12 + [1] * 4),
    ],
)
def test_inclusion_by_hand(value, size, inclusion):
    np.testing.assert_allclose(max_variance_inclusion(np.array(value, dtype=float), size), inclusion, atol=1e-15)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", range(1, 8))
def test_it_is_the_best_of_all_subsets(seed, size):
    rng = np.random.default_rng(seed)
    value = rng.normal(size=7) if seed < 3 else rng.integers(3, size=7).astype(float)
    subset = draw_max_variance(value, size, rng)
    assert np.unique(subset).size == size
    assert np.var(value[subset]) == pytest.approx(best_variance(value, size), abs=1e-12)


@pytest.mark.parametrize("size", range(2, 7))
def test_variances_far_from_zero_are_still_told_apart(size):
    # Around 1e8, squares lose all that distinguishes the values.
    value = np.random.default_rng(1).normal(size=8)
    near, far = (max_variance_lows(np.sort(value) + offset, size) for offset in (0.0, 1e8))
    assert near.size == 1
    np.testing.assert_array_equal(far, near)


def test_episodes_are_shared_out_over_the_groups():
    # Two groups of 4, K = 3: 1.5 each. One: either end, ½ each; two: both ends. π of the ends ½ · ½ + ½ · 1 = 3/4.
    credit = credit_of([0.0, 1.0, 2.0, 3.0, 10.0, 10.5, 11.0, 30.0])
    group = np.repeat([0, 1], 4)
    sampler = PODS(num_episodes=3)
    selection = sampler(credit, group, 3, np.random.default_rng(0))
    expected = [0.75, 0, 0, 0.75, 0.75, 0, 0, 0.75]
    np.testing.assert_allclose(selection.inclusion, expected, atol=1e-15)
    np.testing.assert_allclose(selection.prob, np.array(expected) / 3, atol=1e-15)
    np.testing.assert_allclose(frequency(sampler, credit, group, 3), expected, rtol=0, atol=0.04)


def test_groups_of_unlike_size_get_a_share_of_their_size():
    # Groups of 2 and 6, K = 4: quotas 1 and 3. One of (0, 1): either; three of six: two lows and a high or one and two.
    credit = credit_of([0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    group = np.array([0, 0, 1, 1, 1, 1, 1, 1])
    sampler = PODS(num_episodes=4)
    np.testing.assert_allclose(sampler(credit, group, 4, np.random.default_rng(0)).inclusion, [0.5] * 8, atol=1e-15)
    np.testing.assert_allclose(frequency(sampler, credit, group, 4), [0.5] * 8, rtol=0, atol=0.04)


def test_over_the_pool_a_group_may_get_nothing():
    credit = credit_of([0.0, 1.0, 2.0, 3.0, 10.0, 10.5, 11.0, 30.0])
    selection = PODS(num_episodes=2, scope="pool")(credit, np.repeat([0, 1], 4), 2, np.random.default_rng(0))
    assert set(selection.index) == {0, 7}


def test_it_is_the_returns_that_vary_and_not_the_advantages():
    # Over the pool: advantages are alike in both groups, the returns are not.
    credit = credit_of([-1.0, 1.0, -1.0, 1.0], returns=[0.0, 0.1, 0.0, 8.0])
    for seed in range(10):
        selection = PODS(num_episodes=2, scope="pool")(credit, np.array([0, 0, 1, 1]), 2, np.random.default_rng(seed))
        assert 3 in selection.index
        assert 1 not in selection.index


def test_returns_equal_to_rounding_are_equal():
    credit = credit_of([0.0] * 4, returns=[0.1 + 0.2, 0.3, 0.3, 0.3])
    selection = PODS(num_episodes=2)(credit, np.zeros(4, dtype=int), 2, np.random.default_rng(0))
    np.testing.assert_allclose(selection.inclusion, [0.5] * 4, atol=1e-15)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match=r"sampler\.scope='batch'.*group, pool"):
        PODS(num_episodes=1, scope="batch")
