"""Properties of the group statistics and turn returns on arbitrary rewards."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from msgrpo_lab.credit.base import Rewards, centre_by_group
from msgrpo_lab.credit.episode_return import episode_advantage
from msgrpo_lab.credit.reward_to_go import reward_to_go

SEEDS = st.integers(0, 2**32 - 1)
VALUES = st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=1, max_size=24)
EXACT = st.lists(st.integers(-1000, 1000).map(lambda n: n / 8), min_size=1, max_size=24)


def advantages(values, groups, **arguments):
    reward_ET = np.array(values)[:, None]
    return episode_advantage(Rewards(reward_ET, np.ones_like(reward_ET, dtype=bool)), groups, **arguments)


@given(VALUES, st.integers(1, 5), SEEDS)
def test_advantages_of_a_group_sum_to_zero(values, num_groups, seed):
    groups = np.random.default_rng(seed).integers(num_groups, size=len(values))
    adv = advantages(values, groups)
    for group in np.unique(groups):
        assert abs(adv[groups == group].sum()) < 1e-6


@given(EXACT, st.integers(1, 5), SEEDS)
def test_advantages_of_a_group_have_unit_spread_or_none(values, num_groups, seed):
    groups = np.random.default_rng(seed).integers(num_groups, size=len(values))
    adv = advantages(values, groups)
    for group in np.unique(groups):
        member = np.array(values)[groups == group]
        spread = adv[groups == group].std()
        assert spread == 0.0 if np.ptp(member) == 0.0 else abs(spread - 1.0) < 1e-4


@given(EXACT)
def test_order_of_returns_is_the_order_of_advantages(values):
    adv = advantages(values, np.zeros(len(values), dtype=int))
    order = np.argsort(values, kind="stable")
    assert (np.diff(adv[order]) >= 0.0).all()


@given(EXACT, SEEDS)
def test_group_mean_and_std_are_numpys(values, seed):
    groups = np.random.default_rng(seed).integers(3, size=len(values))
    values = np.array(values)
    deviation, std = centre_by_group(values, groups, magnitude_N=np.abs(values))
    for group in np.unique(groups):
        member = values[groups == group]
        np.testing.assert_allclose(deviation[groups == group], member - member.mean(), atol=1e-9)
        np.testing.assert_allclose(std[groups == group], member.std(), atol=1e-9)


@given(EXACT, st.lists(st.integers(1, 4), min_size=24, max_size=24))
def test_an_integer_weight_is_that_many_copies(values, weights):
    values, weights = np.array(values), np.array(weights[: len(values)])
    zeros = np.zeros(len(values), dtype=int)
    weighted = centre_by_group(values, zeros, magnitude_N=np.abs(values), weight_N=weights.astype(float))
    copied_values = np.repeat(values, weights)
    copied = centre_by_group(copied_values, np.repeat(zeros, weights), magnitude_N=np.abs(copied_values))
    np.testing.assert_allclose(np.repeat(weighted.deviation, weights), copied.deviation, atol=1e-9)
    np.testing.assert_allclose(weighted.std[0], copied.std[0], atol=1e-9)


@given(st.permutations([0.1, 0.2, 0.3, -0.15, 0.05, 0.7]), st.permutations([0.1, 0.2, 0.3, -0.15, 0.05, 0.7]))
def test_the_same_rewards_in_another_order_are_the_same_return(first, second):
    reward_ET = np.array([first, second])
    adv = episode_advantage(Rewards(reward_ET, np.ones_like(reward_ET, dtype=bool)), np.zeros(2, dtype=int))
    np.testing.assert_array_equal(adv, 0.0)


@given(EXACT, st.floats(0.0, 10.0), st.floats(0.0, 10.0))
def test_a_higher_floor_never_raises_an_advantage(values, low, high):
    groups = np.zeros(len(values), dtype=int)
    low, high = min(low, high), max(low, high)
    assert (
        np.abs(advantages(values, groups, min_std=high)) <= np.abs(advantages(values, groups, min_std=low)) + 1e-12
    ).all()


@given(SEEDS, st.floats(0.0, 1.0))
def test_turn_returns_satisfy_bellmans_equation(seed, gamma):
    reward_ET = np.random.default_rng(seed).normal(size=(4, 6))
    return_ET = reward_to_go(reward_ET, gamma)
    np.testing.assert_allclose(return_ET[:, :-1], reward_ET[:, :-1] + gamma * return_ET[:, 1:], atol=1e-12)
    np.testing.assert_array_equal(return_ET[:, -1], reward_ET[:, -1])


@given(SEEDS)
def test_the_first_undiscounted_turn_return_is_the_episode_return(seed):
    reward_ET = np.random.default_rng(seed).normal(size=(5, 7))
    np.testing.assert_allclose(reward_to_go(reward_ET, 1.0)[:, 0], reward_ET.sum(axis=1), atol=1e-12)
