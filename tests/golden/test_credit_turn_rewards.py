"""Discounted step credit and MT-GRPO advantages worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from credit_made import Played, batch_of, rollout_of

from msgrpo_lab.credit.discounted_step import DiscountedStep
from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.credit.mt_grpo import MTGRPO

# γ = 1/2. Episode 0 has rewards (0, 0, 1): turn returns 1/4, 1/2, 1. Episode 1 has (2): 2.
SOONER_AND_LATER = ([[0.0, 0.0, 1.0], [2.0]], [0, 0])


def test_discounted_step_counts_turns_alike():
    # Mean 3.75/4 = 15/16; deviations −11/16, −7/16, 1/16, 17/16; variance (121 + 49 + 1 + 289)/256/4 = 460/1024,
    # std 0.670237831203...
    credit = DiscountedStep(gamma=0.5)(batch_of(*SOONER_AND_LATER))
    std = np.sqrt(460 / 1024) + 1e-6
    np.testing.assert_allclose(16 * std * credit.turn_adv, [[-11.0, -7.0, 1.0], [17.0, 0.0, 0.0]], atol=1e-12)


def test_discounted_step_counting_episodes_alike():
    # Weights 1/3, 1/3, 1/3, 1: mean (1.75/3 + 2)/2 = 31/24; deviations −25/24, −19/24, −7/24, 17/24.
    credit = DiscountedStep(gamma=0.5, normalise="none", baseline_weighting="episode")(batch_of(*SOONER_AND_LATER))
    np.testing.assert_allclose(24 * credit.turn_adv, [[-25.0, -19.0, -7.0], [17.0, 0.0, 0.0]], atol=1e-12)


def test_discounted_step_counting_tokens_alike():
    # Tokens 1, 1, 2 and 4: mean (0.25 + 0.5 + 2·1 + 4·2)/8 = 10.75/8 = 43/32.
    batch = rollout_of([Played(rewards=[0.0, 0.0, 1.0], tokens=[1, 1, 2]), Played(rewards=[2.0], tokens=[4])], [0, 0])
    credit = DiscountedStep(gamma=0.5, normalise="none", baseline_weighting="token")(batch)
    np.testing.assert_allclose(32 * credit.turn_adv, [[-35.0, -27.0, -11.0], [21.0, 0.0, 0.0]], atol=1e-12)


def test_discounted_step_prefers_the_shorter_way():
    # Both succeed, and MS-GRPO gives both nothing. Turn returns 0.81, 0.9, 1 against 1.
    batch = batch_of([[0.0, 0.0, 1.0], [1.0]], [0, 0])
    credit = DiscountedStep()(batch)
    assert credit.turn_adv[0, 0] < credit.turn_adv[0, 1] < 0.0 < credit.turn_adv[1, 0]
    np.testing.assert_array_equal(credit.episode_adv, 0.0)


# Episode 0: (1/2, 1), episode 1: (−1/2, 0), episode 2: (0). Returns 3/2, −1/2, 0: mean 1/3, deviations 7/6, −5/6, −1/3.
# Turn rewards before the last turn: 1/2 and −1/2 at turn 0; mean 0.
TURN_AND_OUTCOME = ([[0.5, 1.0], [-0.5, 0.0], [0.0]], [0, 0, 0])


def test_mt_grpo_adds_the_turns_own_reward_before_the_last_turn():
    credit = MTGRPO(normalise="none")(batch_of(*TURN_AND_OUTCOME))
    np.testing.assert_allclose(
        credit.turn_adv, [[7 / 6 + 0.5, 7 / 6], [-5 / 6 - 0.5, -5 / 6], [-1 / 3, 0.0]], atol=1e-15
    )


def test_mt_grpo_normalises_each_part():
    # Outcome variance (49 + 25 + 4)/36/3 = 13/18, std 0.849836585598798; turn std 1/2.
    credit = MTGRPO()(batch_of(*TURN_AND_OUTCOME))
    outcome, turn = 0.849836585598798 + 1e-6, 0.5 / (0.5 + 1e-6)
    np.testing.assert_allclose(
        credit.turn_adv,
        [[7 / 6 / outcome + turn, 7 / 6 / outcome], [-5 / 6 / outcome - turn, -5 / 6 / outcome], [-1 / 3 / outcome, 0]],
        atol=1e-12,
    )


def test_mt_grpo_weighs_the_turn_part():
    credit = MTGRPO(normalise="none", turn_weight=3.0)(batch_of(*TURN_AND_OUTCOME))
    np.testing.assert_allclose(credit.turn_adv[:, 0], [7 / 6 + 1.5, -5 / 6 - 1.5, -1 / 3], atol=1e-15)


def test_mt_grpo_with_the_last_reward_as_outcome():
    # Last rewards (1, 0, 0): mean 1/3, deviations 2/3, −1/3, −1/3.
    credit = MTGRPO(normalise="none", outcome="last")(batch_of(*TURN_AND_OUTCOME))
    np.testing.assert_allclose(
        credit.turn_adv, [[2 / 3 + 0.5, 2 / 3], [-1 / 3 - 0.5, -1 / 3], [-1 / 3, 0.0]], atol=1e-15
    )


def test_mt_grpo_compares_turns_of_one_index():
    # Episode 0: (1, 2, 9), episode 1: (4, 0). Turn 0: 1, 4 → ∓3/2; turn 1: 2 alone, for episode 1 ends there → 0.
    # Outcome 12 and 4 → ±4.
    credit = MTGRPO(normalise="none")(batch_of([[1.0, 2.0, 9.0], [4.0, 0.0]], [0, 0]))
    np.testing.assert_allclose(credit.turn_adv, [[2.5, 4.0, 4.0], [-2.5, -4.0, 0.0]], atol=1e-15)


@pytest.mark.parametrize(
    ("weighting", "turn_part"),
    [
        ("step", [-4 / 3, -1 / 3, 5 / 3]),  # mean of 1, 2, 4 is 7/3
        ("episode", [-7 / 4, -3 / 4, 5 / 4]),  # (1.5 + 4)/2 = 11/4
        ("token", [-2 / 3, 1 / 3, 7 / 3]),  # 5, 3 and 1 tokens: (5·1 + 3·2 + 1·4)/9 = 5/3
    ],
)
def test_mt_grpo_compares_with_all_turns_of_the_group(weighting, turn_part):
    # Outcome ±4 as above; last turns, of 8 tokens, are left out.
    batch = rollout_of(
        [Played(rewards=[1.0, 2.0, 9.0], tokens=[5, 3, 8]), Played(rewards=[4.0, 0.0], tokens=[1, 8])], [0, 0]
    )
    credit = MTGRPO(normalise="none", baseline="group", baseline_weighting=weighting)(batch)
    np.testing.assert_allclose(
        credit.turn_adv,
        [[4 + turn_part[0], 4 + turn_part[1], 4.0], [-4 + turn_part[2], -4.0, 0.0]],
        atol=1e-15,
    )


def test_mt_grpo_without_the_turn_part_is_ms_grpo():
    batch = batch_of(*TURN_AND_OUTCOME)
    np.testing.assert_array_equal(MTGRPO(turn_weight=0.0)(batch).turn_adv, EpisodeReturn()(batch).turn_adv)


def test_mt_grpo_keeps_groups_apart():
    # The second group has its own turn rewards, 5 and 7.
    rewards = [*TURN_AND_OUTCOME[0], [5.0, 0.0], [7.0, 0.0]]
    credit = MTGRPO(normalise="none")(batch_of(rewards, [0, 0, 0, 1, 1]))
    np.testing.assert_allclose(credit.turn_adv[:3, 0], [7 / 6 + 0.5, -5 / 6 - 0.5, -1 / 3], atol=1e-15)
    np.testing.assert_allclose(credit.turn_adv[3:], [[-2.0, -1.0], [2.0, 1.0]], atol=1e-15)


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (DiscountedStep, {"gamma": 1.5}, r"credit\.gamma=1\.5.*\[0, 1\]"),
        (DiscountedStep, {"normalise": "batch"}, r"credit\.normalise='batch'.*std, none"),
        (DiscountedStep, {"baseline_weighting": "row"}, r"credit\.baseline_weighting='row'"),
        (MTGRPO, {"turn_weight": -1.0}, r"credit\.turn_weight=-1\.0: must lie in \[0, 1e\+06\]"),
        (MTGRPO, {"turn_weight": float("inf")}, r"credit\.turn_weight=inf: must lie in \[0, 1e\+06\]"),
        (MTGRPO, {"outcome": "success"}, r"credit\.outcome='success'.*return, last"),
        (MTGRPO, {"baseline": "batch"}, r"credit\.baseline='batch'.*turn, group"),
        (MTGRPO, {"baseline_weighting": "row"}, r"credit\.baseline_weighting='row'"),
    ],
)
def test_bad_arguments_are_named(rule, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        rule(**arguments)
    assert "\n" not in str(error.value)
