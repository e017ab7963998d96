"""Sampling probabilities, inclusion probabilities and draws worked out by hand or by enumeration."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from msgrpo_lab.sampler.abs_advantage import AbsAdvantage, abs_advantage_prob
from msgrpo_lab.sampler.base import draw, inclusion_of, select
from msgrpo_lab.sampler.uniform import Uniform
from msgrpo_lab.types import Credit


def credit_of(adv):
    adv = np.array(adv, dtype=float)
    return Credit(turn_adv=adv[:, None], turn_mask=np.ones((adv.size, 1), dtype=bool), episode_adv=adv)


def enumerated_inclusion(prob, count):
    """Inclusion probabilities of successive sampling: the sum over all ordered draws of their probabilities."""
    inclusion = np.zeros(len(prob))
    for order in permutations(range(len(prob)), count):
        chance, left = 1.0, 1.0
        for i in order:
            chance *= prob[i] / left
            left -= prob[i]
        inclusion[list(order)] += chance
    return inclusion


# --- single-draw probabilities -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adv", "alpha", "floor", "expected"),
    [
        # |Â| = 1, 2, 5: sum 8
        ([1, -2, 5], 1.0, 0.0, [0.125, 0.25, 0.625]),
        # squares 1, 4, 25: sum 30
        ([1, -2, 5], 2.0, 0.0, [1 / 30, 4 / 30, 25 / 30]),
        # roots 1, 2, 3: sum 6
        ([1, -4, 9], 0.5, 0.0, [1 / 6, 2 / 6, 3 / 6]),
        # floor 1: 2, 3, 6: sum 11
        ([1, -2, 5], 1.0, 1.0, [2 / 11, 3 / 11, 6 / 11]),
        # a zero advantage has probability 0 without a floor, and 0.5/(0.5 + 1.5 + 2.5) = 1/9 with one of 0.5
        ([0, 1, -2], 1.0, 0.0, [0.0, 1 / 3, 2 / 3]),
        ([0, 1, -2], 1.0, 0.5, [1 / 9, 3 / 9, 5 / 9]),
        # 0⁰ = 1
        ([0, 1, -2], 0.0, 0.0, [1 / 3, 1 / 3, 1 / 3]),
        ([0, 0, 0, 0], 1.0, 0.0, [0.25] * 4),
        ([0, 0, 0, 0], 2.0, 3.0, [0.25] * 4),
        ([-3], 1.0, 0.0, [1.0]),
    ],
)
def test_probabilities(adv, alpha, floor, expected):
    np.testing.assert_allclose(
        abs_advantage_prob(np.array(adv, dtype=float), alpha=alpha, floor=floor), expected, atol=1e-14
    )


def test_sign_does_not_matter():
    np.testing.assert_array_equal(
        abs_advantage_prob(np.array([0.5, -1.5, 2.0])), abs_advantage_prob(np.array([-0.5, 1.5, -2.0]))
    )


def test_alpha_zero_is_uniform_to_the_bit():
    adv = np.random.default_rng(0).normal(size=48)
    adv[:10] = 0.0
    np.testing.assert_array_equal(abs_advantage_prob(adv, alpha=0.0), np.full(48, 1 / 48))


@pytest.mark.parametrize("alpha", [500.0, 1e6])
def test_a_large_exponent_neither_overflows_nor_vanishes(alpha):
    # 4^500 and 0.001^500 are both out of range; the largest advantage takes all.
    np.testing.assert_allclose(abs_advantage_prob(np.array([4.0, -3.0, 0.5]), alpha=alpha), [1, 0, 0], atol=1e-60)
    np.testing.assert_allclose(abs_advantage_prob(np.array([1e-3, 0.0]), alpha=alpha), [1, 0], atol=1e-60)


def test_tiny_advantages_keep_their_proportions():
    np.testing.assert_allclose(abs_advantage_prob(np.array([1e-300, 3e-300])), [0.25, 0.75], atol=1e-12)


# --- inclusion probabilities ---------------------------------------------------------------------------------------


def test_inclusion_with_replacement_is_exact():
    # Expected number of draws K p = 4 · (0.125, 0.25, 0.625)
    np.testing.assert_array_equal(
        inclusion_of(np.array([0.125, 0.25, 0.625]), 4, replace=True), np.array([0.5, 1.0, 2.5])
    )


def test_uniform_inclusion_is_exact():
    np.testing.assert_array_equal(inclusion_of(np.full(7, 1 / 7), 3, replace=False), np.full(7, 3 / 7))


def test_all_drawn_is_one_each():
    np.testing.assert_array_equal(inclusion_of(np.array([0.1, 0.2, 0.7]), 3, replace=False), np.ones(3))


def test_one_drawn_is_the_single_draw_probability():
    prob = np.array([0.2, 0.0, 0.3, 0.5])
    np.testing.assert_array_equal(inclusion_of(prob, 1, replace=False), prob)


def test_fill_shares_the_rest_equally():
    # Two non-zero, K = 4: both certain; the other 2 draws fall on 5 episodes: 2/5 each.
    prob = np.array([0, 0.75, 0, 0, 0.25, 0, 0])
    np.testing.assert_allclose(inclusion_of(prob, 4, replace=False), [0.4, 1, 0.4, 0.4, 1, 0.4, 0.4], atol=1e-15)


def test_as_many_non_zero_as_wanted_leaves_nothing_for_the_rest():
    np.testing.assert_array_equal(inclusion_of(np.array([0.5, 0, 0.3, 0.2]), 3, replace=False), [1, 0, 1, 1])


def test_clock_inclusion_by_hand():
    # p = (1/2, 1/4, 1/4), K = 2. With x = exp(−t/4): (1 − x²) + 2(1 − x) = 2 → x² + 2x − 1 = 0 → x = √2 − 1,
    # so π = (1 − (3 − 2√2), 1 − (√2 − 1), …) = (2√2 − 2, 2 − √2, 2 − √2) = (0.8284271, 0.5857864, 0.5857864).
    # Successive sampling exactly: π_0 = 1/2 + 2 · 1/4 · (1/2)/(3/4) = 5/6 = 0.8333, the others 7/12 = 0.5833.
    prob = np.array([0.5, 0.25, 0.25])
    root = 2**0.5
    np.testing.assert_allclose(
        inclusion_of(prob, 2, replace=False), [2 * root - 2, 2 - root, 2 - root], rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(enumerated_inclusion(prob, 2), [5 / 6, 7 / 12, 7 / 12], atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(4))
def test_inclusion_is_near_enumeration(count, seed):
    prob = abs_advantage_prob(np.random.default_rng(seed).normal(size=6))
    np.testing.assert_allclose(
        inclusion_of(prob, count, replace=False), enumerated_inclusion(prob, count), rtol=0, atol=0.1
    )


def test_inclusion_error_is_small_at_the_size_of_a_small_rollout():
    rng = np.random.default_rng(0)
    prob = abs_advantage_prob(rng.normal(size=64))
    drawn = np.zeros(64)
    for _ in range(20_000):
        drawn[draw(prob, 32, rng, replace=False)] += 1
    # Standard error at most 0.5/√20000 = 0.0035; the approximation's own error is below 0.006.
    np.testing.assert_allclose(inclusion_of(prob, 32, replace=False), drawn / 20_000, rtol=0, atol=0.02)


@pytest.mark.parametrize("skew", [1e-3, 1e-12, 1e-100, 1e-300, 1e-320])
def test_inclusion_survives_extreme_skew(skew):
    # One nearly certain, K = 3 of 5: the other four share the two remaining places.
    prob = np.array([1.0, skew, skew, skew, skew])
    prob /= prob.sum()
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        inclusion = inclusion_of(prob, 3, replace=False)
    np.testing.assert_allclose(inclusion, [1.0, 0.5, 0.5, 0.5, 0.5], atol=0.01)
    assert inclusion.sum() == pytest.approx(3.0, abs=1e-9)


# --- draws ---------------------------------------------------------------------------------------------------------


def test_draws_follow_successive_sampling():
    # Ordered draws of 2 of 3 with p = (1/2, 1/3, 1/6), sets by hand:
    # {0,1}: 1/2·(1/3)/(1/2) + 1/3·(1/2)/(2/3) = 1/3 + 1/4 = 7/12
    # {0,2}: 1/2·(1/6)/(1/2) + 1/6·(1/2)/(5/6) = 1/6 + 1/10 = 4/15
    # {1,2}: 1/3·(1/6)/(2/3) + 1/6·(1/3)/(5/6) = 1/12 + 1/15 = 3/20
    rng = np.random.default_rng(0)
    count = {(0, 1): 0, (0, 2): 0, (1, 2): 0}
    for _ in range(30_000):
        count[tuple(sorted(draw(np.array([1 / 2, 1 / 3, 1 / 6]), 2, rng, replace=False).tolist()))] += 1
    share = np.array(list(count.values())) / 30_000
    np.testing.assert_allclose(share, [7 / 12, 4 / 15, 3 / 20], rtol=0, atol=0.015)  # 5 standard errors


def test_draw_order_is_exchangeable():
    # Episode 0 is always drawn; each of the 3 places is as likely.
    rng = np.random.default_rng(0)
    prob = np.array([0.97, 0.01, 0.01, 0.01])
    place = [int(np.flatnonzero(d == 0)[0]) for d in (draw(prob, 3, rng, replace=False) for _ in range(6000)) if 0 in d]
    np.testing.assert_allclose(np.bincount(place) / len(place), [1 / 3] * 3, rtol=0, atol=0.035)


def test_fill_is_uniform_over_the_zero_probability_episodes():
    rng = np.random.default_rng(0)
    prob = np.array([0.0, 1.0, 0.0, 0.0, 0.0])
    drawn = np.zeros(5)
    for _ in range(8000):
        drawn[draw(prob, 3, rng, replace=False)] += 1
    np.testing.assert_allclose(drawn / 8000, [0.5, 1.0, 0.5, 0.5, 0.5], rtol=0, atol=0.03)


def test_draws_with_replacement_follow_prob():
    prob = np.array([0.5, 0.0, 0.2, 0.3])
    drawn = np.bincount(draw(prob, 40_000, np.random.default_rng(0), replace=True), minlength=4)
    np.testing.assert_allclose(drawn / 40_000, prob, rtol=0, atol=0.0125)
    assert drawn[1] == 0


def test_a_zero_advantage_is_never_drawn_while_others_last():
    credit = credit_of([0.0, 1.0, 0.0, -1.0, 0.5, 0.0])
    sampler = AbsAdvantage(num_episodes=3)
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert set(sampler(credit, np.zeros(6, dtype=int), 3, rng).index) == {1, 3, 4}


def test_the_argument_decides_how_many_are_drawn():
    selection = Uniform(num_episodes=3)(credit_of(np.zeros(8)), np.zeros(8, dtype=int), 5, np.random.default_rng(0))
    assert selection.index.shape == selection.weight.shape == (5,)


# --- importance weights --------------------------------------------------------------------------------------------


def test_importance_weights_by_hand():
    # p = (1/4, 3/4), K = 2 with replacement: inclusion (1/2, 3/2), K/E = 1 → weights 2 and 2/3.
    credit = credit_of([1.0, -3.0])
    sampler = AbsAdvantage(num_episodes=2, replace=True, importance_weights=True)
    selection = sampler(credit, np.zeros(2, dtype=int), 2, np.random.default_rng(0))
    np.testing.assert_allclose(selection.weight, np.array([2.0, 2 / 3])[selection.index], atol=1e-14)


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("importance_weights", [True, False])
def test_uniform_weights_are_one(replace, importance_weights):
    sampler = Uniform(num_episodes=3, replace=replace, importance_weights=importance_weights)
    selection = sampler(credit_of(np.arange(7)), np.zeros(7, dtype=int), 3, np.random.default_rng(0))
    np.testing.assert_allclose(selection.weight, np.ones(3), atol=1e-15)


def test_weights_are_one_unless_asked_for():
    selection = AbsAdvantage(num_episodes=2)(
        credit_of([1.0, 2.0, 3.0]), np.zeros(3, dtype=int), 2, np.random.default_rng(0)
    )
    np.testing.assert_array_equal(selection.weight, np.ones(2))


def test_importance_weighted_mean_is_unbiased_with_replacement():
    # Expectation over the draws, exactly: E[(1/K) Σ w f] = Σ_i p_i w_i f_i, with w_i the weight an episode gets.
    f = np.array([3.0, -1.0, 4.0, 10.0])
    prob = np.array([0.1, 0.2, 0.3, 0.4])
    rng = np.random.default_rng(0)
    weight = np.zeros(4)
    selection = select(prob, 200, rng, replace=True, importance_weights=True)
    weight[selection.index] = selection.weight
    assert (prob * weight * f).sum() == pytest.approx(f.mean(), abs=1e-12)
    assert (prob * f).sum() != pytest.approx(f.mean(), abs=0.5)


def test_importance_weighted_mean_is_nearly_unbiased_without_replacement():
    # Exactly, over all sets: E[(1/K) Σ w f] = (1/K) Σ_i π_i w_i f_i with π enumerated and w from the approximation.
    rng = np.random.default_rng(1)
    f = rng.normal(size=7)
    prob = abs_advantage_prob(rng.uniform(0.5, 2.0, size=7))
    weight = 3 / 7 / inclusion_of(prob, 3, replace=False)
    estimate = (enumerated_inclusion(prob, 3) * weight * f).sum() / 3
    assert estimate == pytest.approx(f.mean(), abs=0.01)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [Uniform, AbsAdvantage])
@pytest.mark.parametrize("count", [0, -4])
def test_fewer_than_one_episode_is_refused_at_construction(sampler, count):
    with pytest.raises(ValueError, match=rf"sampler\.num_episodes={count}: must be at least 1"):
        sampler(num_episodes=count)


@pytest.mark.parametrize("sampler", [Uniform, AbsAdvantage])
def test_more_than_the_pool_is_refused_without_replacement(sampler):
    with pytest.raises(
        ValueError, match=r"sampler\.num_episodes=5 exceeds the rollout's 4.*sampler\.replace=true"
    ) as error:
        sampler(num_episodes=5)(credit_of([1, 2, 3, 4]), np.zeros(4, dtype=int), 5, np.random.default_rng(0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sampler", [Uniform, AbsAdvantage])
def test_more_than_the_pool_is_fine_with_replacement(sampler):
    selection = sampler(num_episodes=9, replace=True)(
        credit_of([1, 2, 3, 4]), np.zeros(4, dtype=int), 9, np.random.default_rng(0)
    )
    assert selection.index.size == 9


@pytest.mark.parametrize("sampler", [Uniform, AbsAdvantage])
def test_a_request_for_none_is_refused(sampler):
    with pytest.raises(ValueError, match=r"sampler\.num_episodes=0"):
        sampler(num_episodes=1)(credit_of([1.0]), np.zeros(1, dtype=int), 0, np.random.default_rng(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_advantage_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match=r"episode_adv\[1\].*must be finite"):
        AbsAdvantage(num_episodes=1)(credit_of([0.0, bad]), np.zeros(2, dtype=int), 1, np.random.default_rng(0))


def test_group_index_must_match():
    with pytest.raises(ValueError, match=r"group_index \(3,\) must both be \[E\]"):
        Uniform(num_episodes=1)(credit_of([0.0, 1.0]), np.zeros(3, dtype=int), 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, r"sampler\.alpha=-1\.0"),
        ({"alpha": float("nan")}, r"sampler\.alpha=nan"),
        ({"floor": -0.1}, r"sampler\.floor=-0\.1"),
        ({"floor": float("inf")}, r"sampler\.floor=inf"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AbsAdvantage(num_episodes=1, **arguments)
