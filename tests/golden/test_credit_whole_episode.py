"""Dr. GRPO and RLOO advantages worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from credit_made import Played, batch_of, rollout_of

from msgrpo_lab.credit.base import Rewards
from msgrpo_lab.credit.dr_grpo import DrGRPO
from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.credit.rloo import RLOO, leave_one_out


def test_dr_grpo_is_the_deviation_from_the_groups_mean():
    # R = (1, 0, 0, 1, 0): mean 2/5. Samplers see it divided by the std √(6/25) = 0.489897948556636.
    credit = DrGRPO()(batch_of([[0.0, 1.0], [0.0], [0.0], [1.0], [0.0]], [0] * 5))
    np.testing.assert_allclose(
        credit.turn_adv, [[0.6, 0.6], [-0.4, 0.0], [-0.4, 0.0], [0.6, 0.0], [-0.4, 0.0]], atol=1e-15
    )
    std = 0.489897948556636 + 1e-6
    np.testing.assert_allclose(credit.episode_adv, [0.6 / std, -0.4 / std, -0.4 / std, 0.6 / std, -0.4 / std])


def test_dr_grpo_keeps_the_size_of_a_groups_differences():
    # Groups (0, 1) and (0, 10): ∓1/2 and ∓5, where MS-GRPO gives ∓1 in both.
    credit = DrGRPO()(batch_of([[0.0], [1.0], [0.0], [10.0]], [0, 0, 1, 1]))
    np.testing.assert_allclose(credit.turn_adv[:, 0], [-0.5, 0.5, -5.0, 5.0], atol=1e-15)


def test_dr_grpo_weighted_by_token():
    # R = (1, 0) with 6 and 4 completion tokens: mean 6/10.
    batch = rollout_of([Played(rewards=[0.0, 1.0], tokens=[2, 4]), Played(rewards=[0.0], tokens=[4])], [0, 0])
    np.testing.assert_allclose(
        DrGRPO(baseline_weighting="token")(batch).turn_adv, [[0.4, 0.4], [-0.6, 0.0]], atol=1e-15
    )


def test_rloo_compares_with_the_mean_of_the_others():
    # R = (1, 0, 0, 2): 1 − 2/3, 0 − 3/3, 0 − 3/3, 2 − 1/3.
    credit = RLOO()(batch_of([[1.0], [0.0], [0.0], [0.5, 1.5]], [4] * 4))
    np.testing.assert_allclose(credit.turn_adv, [[1 / 3, 0.0], [-1.0, 0.0], [-1.0, 0.0], [5 / 3, 5 / 3]], atol=1e-15)


def test_rloo_keeps_groups_apart_and_gives_a_lone_episode_nothing():
    # Group 0: (2, 4) → 2 − 4, 4 − 2. Group 1: 7 alone.
    credit = RLOO()(batch_of([[2.0], [7.0], [4.0]], [0, 1, 0]))
    np.testing.assert_array_equal(credit.turn_adv[:, 0], [-2.0, 0.0, 2.0])


def test_rloo_weighted_by_step():
    # R = (1, 0, 3) of 2, 1, 1 turns: 1 − (0 + 3)/2, 0 − (2·1 + 3)/3, 3 − (2·1 + 0)/3.
    batch = batch_of([[0.5, 0.5], [0.0], [3.0]], [0, 0, 0])
    credit = RLOO(baseline_weighting="step")(batch)
    np.testing.assert_allclose(credit.turn_adv[:, 0], [-1 / 2, -5 / 3, 7 / 3], atol=1e-15)


def test_rloo_as_an_array_function():
    reward_ET = np.array([[1.0], [0.0], [5.0]])
    adv = leave_one_out(Rewards(reward_ET, np.ones_like(reward_ET, dtype=bool)), np.array([0, 0, 0]))
    np.testing.assert_allclose(adv, [-1.5, -3.0, 4.5], atol=1e-15)


@pytest.mark.parametrize("rule", [DrGRPO(), RLOO()])
def test_equal_returns_up_to_rounding_earn_exactly_nothing(rule):
    credit = rule(batch_of([[0.1, 0.2], [0.3], [0.2, 0.1]], [0, 0, 0]))
    np.testing.assert_array_equal(credit.turn_adv, np.zeros((3, 2)))


@pytest.mark.parametrize("rule", [DrGRPO(min_std=0.5), RLOO(min_std=0.5)])
def test_the_floor_acts_on_what_samplers_see_and_not_on_credit(rule):
    batch = batch_of([[0.49], [0.51]], [0, 0])
    np.testing.assert_array_equal(rule(batch).turn_adv, type(rule)()(batch).turn_adv)
    np.testing.assert_array_equal(rule(batch).episode_adv, EpisodeReturn(min_std=0.5)(batch).episode_adv)


@pytest.mark.parametrize("rule", [DrGRPO, RLOO])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline_weighting": "row"}, r"credit\.baseline_weighting='row'.*episode, step, token"),
        ({"delta": 0.0}, r"credit\.delta=0\.0.*positive"),
        ({"min_std": -1.0}, r"credit\.min_std=-1\.0: must lie in \[0, "),
    ],
)
def test_bad_arguments_are_named(rule, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        rule(**arguments)
    assert "\n" not in str(error.value)
