"""Reward-to-go advantages worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from credit_made import Played, batch_of, rollout_of

from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.credit.reward_to_go import RewardToGo, reward_to_go


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [
        # 1 + 0 + 4, 0 + 4, 4
        (1.0, [5.0, 4.0, 4.0, 0.0]),
        # 1 + 0/2 + 4/4, 0 + 4/2, 4
        (0.5, [2.0, 2.0, 4.0, 0.0]),
        (0.0, [1.0, 0.0, 4.0, 0.0]),
    ],
)
def test_turn_returns(gamma, expected):
    reward_ET = np.array([[1.0, 0.0, 4.0, 0.0]])
    np.testing.assert_allclose(reward_to_go(reward_ET, gamma), [expected], atol=1e-15)
    np.testing.assert_array_equal(reward_ET, [[1.0, 0.0, 4.0, 0.0]])  # the input is left as it was


# The group of the cases below: episode 0 has rewards (1, 3), episode 1 has (2).
# Turn returns with γ = 1: G_00 = 4, G_01 = 3, G_10 = 2.
TWO_EPISODES = ([[1.0, 3.0], [2.0]], [0, 0])


def test_group_baseline_weighted_by_episode():
    # Weights 1/2, 1/2, 1: mean (2 + 1.5 + 2)/2 = 2.75 → deviations 1.25, 0.25, −0.75.
    credit = RewardToGo(normalise="none")(batch_of(*TWO_EPISODES))
    np.testing.assert_allclose(credit.turn_adv, [[1.25, 0.25], [-0.75, 0.0]], atol=1e-15)


def test_group_baseline_weighted_by_step():
    # Equal weights: mean 9/3 = 3 → deviations 1, 0, −1.
    credit = RewardToGo(normalise="none", baseline_weighting="step")(batch_of(*TWO_EPISODES))
    np.testing.assert_allclose(credit.turn_adv, [[1.0, 0.0], [-1.0, 0.0]], atol=1e-15)


def test_group_std_weighted_by_episode():
    # Variance (1.25²/2 + 0.25²/2 + 0.75²)/2 = (0.78125 + 0.03125 + 0.5625)/2 = 0.6875, std 0.82915619758885
    credit = RewardToGo()(batch_of(*TWO_EPISODES))
    std = 0.82915619758885 + 1e-6
    np.testing.assert_allclose(credit.turn_adv, [[1.25 / std, 0.25 / std], [-0.75 / std, 0.0]], atol=1e-12)


def test_group_std_weighted_by_step():
    # Variance (1 + 0 + 1)/3, std 0.816496580927726
    credit = RewardToGo(baseline_weighting="step")(batch_of(*TWO_EPISODES))
    std = 0.816496580927726 + 1e-6
    np.testing.assert_allclose(credit.turn_adv, [[1 / std, 0.0], [-1 / std, 0.0]], atol=1e-12)


def test_turn_baseline_compares_the_same_turn_only():
    # Turn 0: (4, 2), mean 3, std 1 → ±1/(1 + 1e-6). Turn 1: episode 0 alone → 0.
    credit = RewardToGo(baseline="turn")(batch_of(*TWO_EPISODES))
    np.testing.assert_allclose(credit.turn_adv, [[0.999999000001, 0.0], [-0.999999000001, 0.0]], atol=1e-12)


def test_discount_enters_turn_returns():
    # γ = 1/2: G_00 = 1 + 1.5 = 2.5, G_01 = 3, G_10 = 2; step mean 2.5 → 0, 0.5, −0.5.
    credit = RewardToGo(gamma=0.5, normalise="none", baseline_weighting="step")(batch_of(*TWO_EPISODES))
    np.testing.assert_allclose(credit.turn_adv, [[0.0, 0.5], [-0.5, 0.0]], atol=1e-15)


def test_group_baseline_weighted_by_token():
    # 1, 3 and 2 completion tokens: mean (4 + 9 + 4)/6 = 17/6 → deviations 7/6, 1/6, −5/6,
    # variance (49 + 3 + 50)/36/6 = 102/216, std 0.687184270936277.
    batch = rollout_of([Played(rewards=[1.0, 3.0], tokens=[1, 3]), Played(rewards=[2.0], tokens=[2])], [0, 0])
    plain = RewardToGo(normalise="none", baseline_weighting="token")(batch)
    np.testing.assert_allclose(plain.turn_adv, [[7 / 6, 1 / 6], [-5 / 6, 0.0]], atol=1e-15)
    std = 0.687184270936277 + 1e-6
    credit = RewardToGo(baseline_weighting="token")(batch)
    np.testing.assert_allclose(credit.turn_adv, [[7 / 6 / std, 1 / 6 / std], [-5 / 6 / std, 0.0]], atol=1e-12)


def test_a_completion_without_tokens_cannot_be_counted_by_tokens():
    batch = rollout_of([Played(rewards=[1.0, 3.0], tokens=[1, 0])], [0])
    with pytest.raises(ValueError, match=r"baseline_weighting=token.*without tokens; use step or episode"):
        RewardToGo(baseline_weighting="token")(batch)


def test_return_batch_normalisation():
    # Two groups; turn returns (4, 3), (2), (7) as rows of one batch: mean 4, deviations 0, −1, −2, 3,
    # variance (0 + 1 + 4 + 9)/4 = 3.5, std 1.870828693386971.
    credit = RewardToGo(baseline="batch", baseline_weighting="step")(batch_of([[1.0, 3.0], [2.0], [7.0]], [0, 0, 1]))
    std = 1.870828693386971 + 1e-6
    np.testing.assert_allclose(credit.turn_adv, [[0.0, -1 / std], [-2 / std, 0.0], [3 / std, 0.0]], atol=1e-12)


def test_batch_baseline_weighted_by_episode():
    # Weights 1/2, 1/2, 1, 1: mean (2 + 1.5 + 2 + 7)/3 = 12.5/3.
    credit = RewardToGo(baseline="batch", normalise="none")(batch_of([[1.0, 3.0], [2.0], [7.0]], [0, 0, 1]))
    mean = 12.5 / 3
    np.testing.assert_allclose(credit.turn_adv, [[4 - mean, 3 - mean], [2 - mean, 0.0], [7 - mean, 0.0]], atol=1e-12)


def test_batch_spread_is_shared_by_the_groups():
    # Group 0: returns (0, 2), deviations ∓1. Group 1: (0, 6), deviations ∓3. Batch variance (1 + 1 + 9 + 9)/4 = 5,
    # std 2.23606797749979 → ∓0.447213…, ∓1.341640…
    credit = RewardToGo(normalise="batch")(batch_of([[0.0], [2.0], [0.0], [6.0]], [0, 0, 1, 1]))
    std = 2.23606797749979 + 1e-6
    np.testing.assert_allclose(credit.turn_adv[:, 0], [-1 / std, 1 / std, -3 / std, 3 / std], atol=1e-12)


def test_batch_spread_is_weighted_by_episode():
    # Group 0: one reward at the end of two turns, returns (2, 2) and (0): mean 1, deviations 1, 1, −1.
    # Group 1: (0, 6): ∓3. Weights 1/2, 1/2, 1, 1, 1: variance (1/2 + 1/2 + 1 + 9 + 9)/4 = 5.
    # By step instead: group 0 has mean 4/3, deviations 2/3, 2/3, −4/3: (4/9 + 4/9 + 16/9 + 18)/5 = 62/15.
    batch = batch_of([[0.0, 2.0], [0.0], [0.0], [6.0]], [0, 0, 1, 1])
    by_episode = RewardToGo(normalise="batch")(batch).turn_adv[3, 0]
    by_step = RewardToGo(normalise="batch", baseline_weighting="step")(batch).turn_adv[3, 0]
    assert by_episode == pytest.approx(3 / (np.sqrt(5.0) + 1e-6), abs=1e-12)
    assert by_step == pytest.approx(3 / (np.sqrt(62 / 15) + 1e-6), abs=1e-12)


def test_batch_spread_around_turn_baselines_is_weighted_by_episode():
    # Turn 0: (4, 2) → ±1; turn 1: 3 alone → 0. Weights 1/2, 1/2, 1: variance (1/2 + 0 + 1)/2 = 3/4. By step: 2/3.
    batch = batch_of(*TWO_EPISODES)
    for weighting, variance in (("episode", 3 / 4), ("step", 2 / 3)):
        credit = RewardToGo(baseline="turn", normalise="batch", baseline_weighting=weighting)(batch)
        std = np.sqrt(variance) + 1e-6
        np.testing.assert_allclose(credit.turn_adv, [[1 / std, 0.0], [-1 / std, 0.0]], atol=1e-12)


def test_one_reward_at_the_end_is_ms_grpo():
    batch = batch_of([[0.0, 0.0, 1.0], [0.0], [0.0, 0.5], [0.0, 0.0], [2.0]], [0, 0, 0, 1, 1])
    expected = EpisodeReturn()(batch)
    credit = RewardToGo()(batch)
    np.testing.assert_allclose(credit.turn_adv, expected.turn_adv, atol=1e-12)
    np.testing.assert_array_equal(credit.turn_mask, expected.turn_mask)


@pytest.mark.parametrize("weighting", ["episode", "step", "token"])
def test_one_reward_at_the_end_is_ms_grpo_of_the_same_weighting(weighting):
    batch = rollout_of(
        [Played(rewards=[0.0, 0.0, 1.0], tokens=[1, 2, 3]), Played(rewards=[0.0]), Played(rewards=[0.0, 0.5])],
        [0, 0, 0],
    )
    np.testing.assert_allclose(
        RewardToGo(baseline_weighting=weighting)(batch).turn_adv,
        EpisodeReturn(baseline_weighting=weighting)(batch).turn_adv,
        atol=1e-12,
    )


def test_step_weighting_is_not_ms_grpo_where_lengths_differ():
    batch = batch_of([[0.0, 0.0, 1.0], [0.0]], [0, 0])
    credit = RewardToGo(baseline_weighting="step", normalise="none")(batch)
    # Step mean of (1, 1, 1, 0) is 3/4, not 1/2.
    np.testing.assert_allclose(credit.turn_adv, [[0.25, 0.25, 0.25], [-0.75, 0.0, 0.0]], atol=1e-15)


@pytest.mark.parametrize("normalise", ["std", "batch", "none"])
@pytest.mark.parametrize("baseline", ["group", "turn"])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_episode_advantage_is_ms_grpo_whatever_the_arguments(normalise, baseline, gamma):
    batch = batch_of([[0.5, 1.0], [0.0], [0.25, 0.0, 1.0], [0.0, -1.0]], [0, 0, 1, 1])
    credit = RewardToGo(normalise=normalise, baseline=baseline, gamma=gamma)(batch)
    np.testing.assert_array_equal(credit.episode_adv, EpisodeReturn()(batch).episode_adv)


@pytest.mark.parametrize("normalise", ["std", "batch", "none"])
@pytest.mark.parametrize("baseline", ["group", "turn"])
def test_equal_turn_returns_up_to_rounding_are_exactly_zero(normalise, baseline):
    # Every turn return is 0.3 in exact arithmetic: (0, 0.3), (0.1 + 0.2) in one turn, 0.3.
    batch = batch_of([[0.0, 0.3], [0.1 + 0.2], [0.3]], [0, 0, 0])
    credit = RewardToGo(normalise=normalise, baseline=baseline)(batch)
    np.testing.assert_array_equal(credit.turn_adv, np.zeros((3, 2)))


@pytest.mark.parametrize("normalise", ["std", "batch", "none"])
def test_rewards_that_cancel_up_to_rounding_are_exactly_zero(normalise):
    # First turn returns: 0.1 + (0.2 − 0.3), which floating point does not make 0, beside 0. Later turns stand alone.
    assert 0.1 + (0.2 - 0.3) != 0.0
    credit = RewardToGo(normalise=normalise, baseline="turn")(batch_of([[0.1, 0.2, -0.3], [0.0]], [0, 0]))
    np.testing.assert_array_equal(credit.turn_adv, np.zeros((2, 3)))


@pytest.mark.parametrize("normalise", ["std", "batch"])
def test_min_std_floors_the_spread(normalise):
    # Deviations ∓0.01 over max(0.01, 0.1) + 1e-6
    batch = batch_of([[0.49], [0.51]], [0, 0])
    credit = RewardToGo(normalise=normalise, min_std=0.1)(batch)
    np.testing.assert_allclose(credit.turn_adv[:, 0], [-0.0999990000100, 0.0999990000100], atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.5}, r"credit\.gamma=1\.5.*\[0, 1\]"),
        ({"gamma": -0.1}, r"credit\.gamma=-0\.1"),
        ({"gamma": float("nan")}, r"credit\.gamma=nan"),
        ({"baseline": "value"}, r"credit\.baseline='value'.*group, turn, batch"),
        ({"baseline_weighting": "row"}, r"credit\.baseline_weighting='row'.*episode, step, token"),
        ({"normalise": "max"}, r"credit\.normalise='max'.*std, batch, none"),
        ({"delta": -1.0}, r"credit\.delta=-1\.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        RewardToGo(**arguments)
    assert "\n" not in str(error.value)


def test_reward_matrix_must_be_a_matrix():
    with pytest.raises(ValueError, match=r"shape \(3,\): must be \[E, T\]"):
        reward_to_go(np.zeros(3), 1.0)
