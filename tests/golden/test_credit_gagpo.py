"""GAGPO advantages worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from credit_made import Played, rollout_of

from msgrpo_lab.credit.gagpo import GAGPO, generalised_advantage, mean_of_visits

# γ = 1/2. Episodes a, b for (0, 1); a, b for (0, 0); b for (1). Turn returns 1/2, 1; 0, 0; 1.
# V(a) = 1/4, V(b) = 2/3. Differences δ: 0 + 1/2·2/3 − 1/4 = 1/12, 1 − 2/3 = 1/3; 1/12, −2/3; 1/3.
VISITS = [
    Played(rewards=[0.0, 1.0], states="ab"),
    Played(rewards=[0.0, 0.0], states="ab"),
    Played(rewards=[1.0], states="b"),
]


def adv(episodes=VISITS, groups=(0, 0, 0), **arguments):
    arguments = {"gamma": 0.5, "normalise": "none", **arguments}
    return GAGPO(**arguments)(rollout_of(episodes, groups)).turn_adv


@pytest.mark.parametrize(
    ("lam", "first_turns"),
    [
        (0.0, [1 / 12, 1 / 12]),
        (0.5, [1 / 12 + 1 / 4 * 1 / 3, 1 / 12 - 1 / 4 * 2 / 3]),
        (1.0, [1 / 2 - 1 / 4, 0 - 1 / 4]),  # turn return minus value
    ],
)
def test_temporal_differences_are_summed_with_lambda(lam, first_turns):
    np.testing.assert_allclose(
        adv(lam=lam), [[first_turns[0], 1 / 3], [first_turns[1], -2 / 3], [1 / 3, 0.0]], atol=1e-15
    )


def test_advantages_are_normalised_in_the_group():
    # λ = 1/2: in sixtieths 10, 20; −5, −40; 20. Mean 1; deviations 9, 19; −6, −41; 19;
    # variance (81 + 361 + 36 + 1681 + 361)/5/3600 = 0.14, std 0.374165738677394.
    expected = np.array([[9.0, 19.0], [-6.0, -41.0], [19.0, 0.0]]) / 60 / (0.374165738677394 + 1e-6)
    np.testing.assert_allclose(adv(lam=0.5, normalise="std"), expected, atol=1e-12)


def test_the_groups_mean_and_std_are_weighted_too():
    # γ = λ = 0: rewards minus values. Episode 0 has 1 in a and 0 in b, episode 1 has 0 in a: V(a) = 1/2, V(b) = 0.
    # Advantages 1/2, 0 and −1/2 weigh 1/2, 1/2 and 1: mean −1/8; deviations 5/8, 1/8, −3/8;
    # variance (25/2 + 1/2 + 9)/64/2 = 22/128.
    episodes = [Played(rewards=[1.0, 0.0], states="ab"), Played(rewards=[0.0], states="a")]
    std = np.sqrt(22 / 128) + 1e-6
    np.testing.assert_allclose(
        adv(episodes, (0, 0), gamma=0.0, lam=0.0, normalise="std", baseline_weighting="episode"),
        [[5 / 8 / std, 1 / 8 / std], [-3 / 8 / std, 0.0]],
        atol=1e-12,
    )


def test_own_visits_are_left_out_of_values():
    # λ = 0. Episode 0: V(a) = 0, V(b) = (0 + 1)/2. Episode 1: V(a) = 1/2, V(b) = 1. Episode 2: V(b) = (1 + 0)/2.
    # δ: 1/2·1/2 − 0, 1 − 1/2; 1/2·1 − 1/2, 0 − 1; 1 − 1/2.
    np.testing.assert_allclose(
        adv(lam=0.0, leave_one_out=True), [[1 / 4, 1 / 2], [0.0, -1.0], [1 / 2, 0.0]], atol=1e-15
    )


def test_a_state_that_nobody_else_met_keeps_its_own_value():
    # a is episode 0's alone, twice, with returns 1 and 2 (γ = 1, λ = 1): value 3/2 with or without leaving out.
    episodes = [Played(rewards=[-1.0, 2.0], states="aa"), Played(rewards=[5.0], states="b")]
    np.testing.assert_allclose(
        adv(episodes, (0, 0), gamma=1.0, lam=1.0, leave_one_out=True), [[-1 / 2, 1 / 2], [0.0, 0.0]], atol=1e-15
    )


@pytest.mark.parametrize(
    ("weighting", "value"),
    [
        ("step", 2 / 3),  # returns 1, 1 and 0
        ("episode", 1 / 2),
        ("token", 2 / 5),  # 1, 1 and 3 tokens
    ],
)
def test_what_a_value_counts_alike(weighting, value):
    episodes = [Played(rewards=[0.0, 1.0], states="aa"), Played(rewards=[0.0], states="a", tokens=[3])]
    np.testing.assert_allclose(
        adv(episodes, (0, 0), gamma=1.0, lam=1.0, baseline_weighting=weighting),
        [[1 - value, 1 - value], [-value, 0.0]],
        atol=1e-15,
    )


def test_values_of_a_group_or_of_all_groups():
    # Two groups of one episode each meet a, for 1 and for 0.
    episodes = [Played(rewards=[1.0], states="a"), Played(rewards=[0.0], states="a")]
    np.testing.assert_array_equal(adv(episodes, (0, 1), lam=1.0), [[0.0], [0.0]])
    np.testing.assert_allclose(adv(episodes, (0, 1), lam=1.0, value_pool="batch"), [[0.5], [-0.5]], atol=1e-15)


@pytest.mark.parametrize("pool", ["group", "batch"])
def test_values_of_states_at_the_same_turn(pool):
    # a at turn 0: returns 1, 0 → ±1/2; a at turn 1: 1 alone.
    episodes = [Played(rewards=[0.0, 1.0], states="aa"), Played(rewards=[0.0], states="a")]
    np.testing.assert_allclose(
        adv(episodes, (0, 0), gamma=1.0, lam=1.0, same_turn=True, value_pool=pool),
        [[0.5, 0.0], [-0.5, 0.0]],
        atol=1e-15,
    )


def test_after_the_last_turn_there_is_no_value():
    # Reward 0 and value 2 in the last turn: the loss of 2 is seen there, and λ carries half of it back (γ = 1).
    reward, value = np.array([[1.0, 0.0, 0.0]]), np.array([[3.0, 2.0, 0.0]])
    np.testing.assert_allclose(
        generalised_advantage(reward, value, gamma=1.0, lam=0.5), [[1 + 2 - 3 + 0.5 * -2, -2.0, 0.0]], atol=1e-15
    )


def test_mean_of_visits():
    # State 0: returns 1, 5, 9 of episodes 0, 0, 1 weighing 1, 1, 2; state 1: 7 of episode 1.
    arguments = (
        np.array([1.0, 5.0, 9.0, 7.0]),
        np.array([0, 0, 0, 1]),
        np.array([0, 0, 1, 1]),
        np.array([1.0, 1, 2, 1]),
    )
    np.testing.assert_allclose(mean_of_visits(*arguments, leave_one_out=False), [6.0, 6.0, 6.0, 7.0], atol=1e-15)
    np.testing.assert_allclose(mean_of_visits(*arguments, leave_one_out=True), [9.0, 9.0, 3.0, 7.0], atol=1e-15)


def test_equal_returns_up_to_rounding_earn_exactly_nothing():
    episodes = [Played(rewards=[0.1, 0.2], states="ab"), Played(rewards=[0.2, 0.1], states="ac")]
    for lam in (0.0, 0.9, 1.0):
        np.testing.assert_array_equal(adv(episodes[:1] * 3, gamma=0.95, lam=lam), np.zeros((3, 2)))
    # From a on, both earn 0.3, in another order: no difference of λ = 1 credit at a, not even of rounding.
    np.testing.assert_array_equal(adv(episodes, (0, 0), gamma=1.0, lam=1.0)[:, 0], [0.0, 0.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.5}, r"credit\.gamma=1\.5.*\[0, 1\]"),
        ({"lam": -0.1}, r"credit\.lam=-0\.1.*\[0, 1\]"),
        ({"value_pool": "all"}, r"credit\.value_pool='all'.*group, batch"),
        ({"normalise": "batch"}, r"credit\.normalise='batch'.*std, none"),
        ({"baseline_weighting": "row"}, r"credit\.baseline_weighting='row'"),
        ({"min_std": float("nan")}, r"credit\.min_std=nan"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        GAGPO(**arguments)
    assert "\n" not in str(error.value)
