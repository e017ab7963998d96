"""MS-GRPO advantages worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from credit_made import Played, batch_of, rollout_of

from msgrpo_lab.credit.base import Rewards, centre_by_group, rewards_of
from msgrpo_lab.credit.episode_return import EpisodeReturn, episode_advantage
from msgrpo_lab.types import RolloutBatch


def test_one_success_of_four():
    # R = (1, 0, 0, 0): mean 1/4, deviations (3/4, −1/4, −1/4, −1/4),
    # population variance (9 + 1 + 1 + 1)/16/4 = 12/64 = 0.1875, std 0.4330127018922193.
    # Â = 0.75/(0.4330127018922193 + 1e-6) = 1.7320468075844 and −0.25/… = −0.5773489358615
    credit = EpisodeReturn()(batch_of([[0.0, 1.0], [0.0], [0.0, 0.0, 0.0], [0.0]], [7, 7, 7, 7]))
    expected = np.array([1.7320468075844, -0.5773489358615, -0.5773489358615, -0.5773489358615])
    np.testing.assert_allclose(credit.episode_adv, expected, atol=1e-12)
    np.testing.assert_allclose(
        credit.turn_adv,
        [
            [expected[0], expected[0], 0.0],
            [expected[1], 0.0, 0.0],
            [expected[2], expected[2], expected[2]],
            [expected[3], 0.0, 0.0],
        ],
        atol=1e-12,
    )
    np.testing.assert_array_equal(
        credit.turn_mask, [[True, True, False], [True, False, False], [True, True, True], [True, False, False]]
    )


def test_two_interleaved_groups():
    # Group 3: R = (2, 4), mean 3, std 1      → ∓1/(1 + 1e-6) = ∓0.999999000001
    # Group 1: R = (−1, 0, 4), mean 1, deviations (−2, −1, 3), variance 14/3, std 2.160246899469287
    #          → (−2, −1, 3)/2.160247899469287 = (−0.92582, −0.46291, 1.38873)
    batch = batch_of([[2.0], [-1.0], [1.0, 3.0], [0.0], [4.0]], [3, 1, 3, 1, 1])
    adv = EpisodeReturn()(batch).episode_adv
    std = 2.160246899469287 + 1e-6
    np.testing.assert_allclose(adv, [-0.999999000001, -2 / std, 0.999999000001, -1 / std, 3 / std], atol=1e-12)


def test_none_gives_deviations_in_reward_units():
    # R = (0.5, 1.5, 4): mean 2 → (−1.5, −0.5, 2)
    batch = batch_of([[0.5], [1.0, 0.5], [4.0]], [0, 0, 0])
    np.testing.assert_allclose(EpisodeReturn(normalise="none")(batch).episode_adv, [-1.5, -0.5, 2.0], atol=1e-15)


def test_min_std_keeps_a_nearly_equal_group_small():
    # R = (0.49, 0.51): std 0.01. With a floor of 0.1 the advantages are ∓0.01/(0.1 + 1e-6) = ∓0.0999990000100, not ∓1.
    batch = batch_of([[0.49], [0.51]], [0, 0])
    np.testing.assert_allclose(
        EpisodeReturn(min_std=0.1)(batch).episode_adv, [-0.0999990000100, 0.0999990000100], atol=1e-12
    )
    assert EpisodeReturn()(batch).episode_adv[1] > 0.9998


def test_min_std_leaves_a_wide_group_alone():
    batch = batch_of([[0.0], [1.0]], [0, 0])
    np.testing.assert_array_equal(EpisodeReturn(min_std=0.5)(batch).episode_adv, EpisodeReturn()(batch).episode_adv)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("episode", [0.5, -0.5]),  # mean of R = (1, 0) is 1/2
        ("step", [0.25, -0.75]),  # 3 turns and 1: mean 3/4
        ("token", [0.4, -0.6]),  # 6 tokens and 4: mean 6/10
    ],
)
def test_what_the_groups_mean_counts_alike(weighting, expected):
    batch = rollout_of([Played(rewards=[0.0, 0.0, 1.0], tokens=[1, 2, 3]), Played(rewards=[0.0], tokens=[4])], [0, 0])
    credit = EpisodeReturn(normalise="none", baseline_weighting=weighting)(batch)
    np.testing.assert_allclose(credit.episode_adv, expected, atol=1e-15)


def test_the_groups_std_is_weighted_as_its_mean():
    # R = (1, 0) weighing 3 and 1: variance (3/16 + 9/16)/4 = 3/16, std 0.4330127018922193.
    batch = batch_of([[0.0, 0.0, 1.0], [0.0]], [0, 0])
    std = 0.4330127018922193 + 1e-6
    credit = EpisodeReturn(baseline_weighting="step")(batch)
    np.testing.assert_allclose(credit.episode_adv, [0.25 / std, -0.75 / std], atol=1e-12)


def test_delta_enters_once():
    # R = (0, 2): std 1, δ = 0.25 → ∓1/1.25 = ∓0.8
    batch = batch_of([[0.0], [2.0]], [0, 0])
    np.testing.assert_allclose(EpisodeReturn(delta=0.25)(batch).episode_adv, [-0.8, 0.8], atol=1e-15)


@pytest.mark.parametrize(
    "rewards",
    [
        pytest.param([[1.0], [1.0], [1.0]], id="equal"),
        pytest.param([[0.1, 0.2], [0.3], [0.2, 0.1]], id="equal-up-to-rounding"),
        pytest.param([[0.1, 0.2, -0.3], [0.0], [0.3, -0.1, -0.2]], id="cancels-to-zero-up-to-rounding"),
        pytest.param([[1e6, 0.1, 0.2], [1e6, 0.3]], id="large-with-rounding"),
        pytest.param([[-2.0]], id="group-of-one"),
        pytest.param([[0.1] * 10, [1.0]], id="ten-tenths"),
    ],
)
@pytest.mark.parametrize("normalise", ["std", "none"])
def test_equal_group_is_exactly_zero(rewards, normalise):
    credit = EpisodeReturn(normalise=normalise)(batch_of(rewards, [0] * len(rewards)))
    np.testing.assert_array_equal(credit.episode_adv, np.zeros(len(rewards)))
    np.testing.assert_array_equal(credit.turn_adv, np.zeros(credit.turn_mask.shape))


def test_small_true_differences_are_not_rounding():
    # 1e-9 beside returns of 1 is a real difference: 1000 times above the rounding threshold.
    adv = EpisodeReturn(normalise="none")(batch_of([[1.0], [1.0 + 2e-9]], [0, 0])).episode_adv
    np.testing.assert_allclose(adv, [-1e-9, 1e-9], rtol=1e-6)


def test_a_value_at_the_mean_is_exactly_zero():
    # The mean of 0.1, 0.2, 0.3 is 0.20000000000000004 in floating point: the middle episode must still get 0,
    # or a sampler that prefers non-zero advantages would treat it as informative.
    adv = EpisodeReturn()(batch_of([[0.1], [0.2], [0.3]], [0, 0, 0])).episode_adv
    assert adv[1] == 0.0
    assert adv[0] < 0.0 < adv[2]


def test_group_statistics_with_weights():
    # Group 0: values (1, 4) with weights (3, 1): mean 7/4, deviations (−3/4, 9/4),
    #          variance (3·9/16 + 81/16)/4 = 108/64 = 1.6875, std 1.299038105676658
    # Group 5: one value: 0 and 0.
    deviation, std = centre_by_group(
        np.array([1.0, 9.0, 4.0]),
        np.array([0, 5, 0]),
        magnitude_N=np.array([1.0, 9.0, 4.0]),
        weight_N=np.array([3.0, 2.0, 1.0]),
    )
    np.testing.assert_allclose(deviation, [-0.75, 0.0, 2.25], atol=1e-15)
    np.testing.assert_allclose(std, [1.299038105676658, 0.0, 1.299038105676658], atol=1e-15)


def test_rewards_become_a_padded_matrix():
    reward, mask = rewards_of(batch_of([[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]], [0, 0, 1]))
    np.testing.assert_array_equal(reward, [[1, 2, 0], [3, 0, 0], [4, 5, 6]])
    np.testing.assert_array_equal(mask, [[True, True, False], [True, False, False], [True, True, True]])


def test_array_function_and_rule_agree():
    rewards = [[0.0, 1.0], [0.5], [0.25, 0.25, 1.0], [2.0]]
    batch = batch_of(rewards, [0, 0, 1, 1])
    matrix = np.array([[0, 1, 0], [0.5, 0, 0], [0.25, 0.25, 1], [2, 0, 0]])
    np.testing.assert_array_equal(
        episode_advantage(Rewards(matrix, matrix > 0), np.array([0, 0, 1, 1])), EpisodeReturn()(batch).episode_adv
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normalise": "median"}, r"credit\.normalise='median'.*std, none"),
        ({"baseline_weighting": "row"}, r"credit\.baseline_weighting='row'.*episode, step, token"),
        ({"delta": 0.0}, r"credit\.delta=0\.0.*positive"),
        ({"delta": float("nan")}, r"credit\.delta=nan"),
        ({"min_std": -1.0}, r"credit\.min_std=-1\.0: must lie in \[0, "),
        ({"min_std": float("inf")}, r"credit\.min_std=inf: must lie in \[0, "),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        EpisodeReturn(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rewards", "groups", "message"),
    [
        ([], [], "episodes is empty"),
        ([[1.0], []], [0, 0], r"episodes\[1\] has no turns"),
        ([[1.0], [0.0, float("nan")]], [0, 0], r"reward=nan in episode 1, turn 1"),
        ([[float("-inf")]], [0], r"reward=-inf in episode 0, turn 0"),
    ],
)
def test_bad_batches_are_named(rewards, groups, message):
    with pytest.raises(ValueError, match=message):
        EpisodeReturn()(batch_of(rewards, groups))


def test_group_index_must_match_the_episodes():
    batch = batch_of([[1.0], [2.0]], [0, 0])
    with pytest.raises(ValueError, match=r"group_index has shape \(3,\).*2 episodes"):
        EpisodeReturn()(RolloutBatch(episodes=batch.episodes, group_index=np.zeros(3, dtype=int)))


def test_only_the_training_reward_counts():
    # `game_reward` is 0 throughout `batch_of`: advantages that came from it would all be 0.
    assert EpisodeReturn()(batch_of([[1.0], [0.0]], [0, 0])).episode_adv[0] > 0.9
