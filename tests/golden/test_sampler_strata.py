"""Quotas, strata and tiers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from msgrpo_lab.sampler.strata import draw_strata, select_strata, select_tiers, whole_quotas


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("quota", [[3.0, 0.0, 2.0], [0.0, 0.0], [5.0]])
def test_whole_quotas_stay(quota):
    for seed in range(20):
        np.testing.assert_array_equal(whole_quotas(np.array(quota), rng(seed)), quota)


@pytest.mark.parametrize(
    "quota",
    [[0.5, 0.5], [1.25, 0.75, 3.0], [0.1] * 10, [2 / 3] * 3, [0.2, 0.3, 2.5, 0.0, 4.0], [1 / 7] * 7, [2.9, 0.05, 0.05]],
)
def test_quotas_are_rounded_without_bias_to_the_same_total(quota):
    quota = np.array(quota)
    generator = rng()
    counts = np.array([whole_quotas(quota, generator) for _ in range(8000)])
    np.testing.assert_array_equal(counts.sum(axis=1), round(quota.sum()))
    assert (np.abs(counts - quota) < 1.0).all()  # rounded down or up, never further
    # Five standard errors of a Bernoulli mean: 5 · 0.5/√8000 = 0.028.
    np.testing.assert_allclose(counts.mean(axis=0), quota, rtol=0, atol=0.028)


def test_any_two_of_four_halves_may_be_rounded_up_together():
    generator = rng()
    assert len({tuple(whole_quotas(np.full(4, 0.5), generator)) for _ in range(200)}) == 6


def test_a_quota_that_is_whole_to_rounding_stays():
    quota = np.array([0.1 + 0.2, 0.7]) * 10  # 3.0000000000000004, 7
    for seed in range(50):
        np.testing.assert_array_equal(whole_quotas(quota, rng(seed)), [3, 7])


def test_strata_get_their_counts_in_random_order():
    stratum = np.array([1, 0, 1, 1, 0, 2, 1])
    generator, first = rng(), np.zeros(3)
    drawn = np.zeros(7)
    for _ in range(6000):
        index = draw_strata(stratum, np.array([1, 2, 1]), generator)
        np.testing.assert_array_equal(np.sort(stratum[index]), [0, 1, 1, 2])
        assert np.unique(index).size == 4
        first[stratum[index[0]]] += 1
        drawn[index] += 1
    np.testing.assert_allclose(first / 6000, [1 / 4, 2 / 4, 1 / 4], rtol=0, atol=0.033)
    np.testing.assert_allclose(drawn / 6000, [1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 2, 1, 1 / 2], rtol=0, atol=0.033)


def test_inclusion_is_quota_over_size():
    # Quotas 1.5 of 3 and 0.5 of 2: π = 1/2 and 1/4; K = 2, so p = π/2.
    selection = select_strata(np.array([0, 1, 0, 1, 0]), np.array([1.5, 0.5]), rng(), importance_weights=True)
    np.testing.assert_allclose(selection.inclusion, [0.5, 0.25, 0.5, 0.25, 0.5], atol=1e-15)
    np.testing.assert_allclose(selection.prob, [0.25, 0.125, 0.25, 0.125, 0.25], atol=1e-15)
    # (K/E)/π = 0.4/0.5 and 0.4/0.25
    weight = np.where(np.array([0, 1, 0, 1, 0])[selection.index] == 0, 0.8, 1.6)
    np.testing.assert_allclose(selection.weight, weight, atol=1e-15)


@pytest.mark.parametrize(
    ("count", "inclusion"),
    [
        # Tiers: 5 holds episodes 1, 4; 7 holds 0, 3, 5; 9 holds 2.
        (1, [0, 1 / 2, 0, 0, 1 / 2, 0]),
        (2, [0, 1, 0, 0, 1, 0]),
        (3, [1 / 3, 1, 0, 1 / 3, 1, 1 / 3]),
        (5, [1, 1, 0, 1, 1, 1]),
        (6, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_tier_is_drawn_out_before_the_next(count, inclusion):
    tier = np.array([7, 5, 9, 7, 5, 7])
    generator, drawn = rng(), np.zeros(6)
    for _ in range(3000):
        selection = select_tiers(tier, count, generator, replace=False, importance_weights=False)
        drawn[selection.index] += 1
    np.testing.assert_allclose(selection.inclusion, inclusion, atol=1e-15)
    np.testing.assert_allclose(drawn / 3000, inclusion, rtol=0, atol=0.046)
    np.testing.assert_array_equal(selection.weight, np.ones(count))


def test_with_replacement_only_the_lowest_tier_is_drawn_from():
    tier = np.array([7, 5, 9, 7, 5, 7])
    selection = select_tiers(tier, 10, rng(), replace=True, importance_weights=False)
    assert set(selection.index) == {1, 4}
    np.testing.assert_array_equal(selection.inclusion, [0, 5, 0, 0, 5, 0])
    np.testing.assert_array_equal(selection.prob, [0, 0.5, 0, 0, 0.5, 0])


def test_importance_weights_of_tiers_give_the_pools_mean_where_all_can_be_drawn():
    # Five of six: π = 1, 1 | 3/4 four times. Over all draws (1/K) Σ π w f is the pool's mean.
    tier, value = np.array([0, 0, 1, 1, 1, 1]), np.array([3.0, -1.0, 2.0, 5.0, 0.0, 7.0])
    selection = select_tiers(tier, 5, rng(), replace=False, importance_weights=True)
    np.testing.assert_allclose(selection.inclusion, [1, 1, 0.75, 0.75, 0.75, 0.75], atol=1e-15)
    weight = 5 / 6 / selection.inclusion
    np.testing.assert_allclose(selection.weight, weight[selection.index], atol=1e-15)
    assert (selection.inclusion * weight * value).sum() / 5 == pytest.approx(value.mean(), abs=1e-12)
