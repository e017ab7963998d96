"""Samplers that prefer a class of episodes: whom they keep, what fills up, and the inclusion, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from lab_made import rollout, turn
from sampler_made import credit_of, frequency

from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.sampler.base import group_spread, with_outcomes
from msgrpo_lab.sampler.dash import Dash
from msgrpo_lab.sampler.dynamic import Dynamic
from msgrpo_lab.sampler.outcome_gated import OutcomeGated
from msgrpo_lab.sampler.pods import PODS
from msgrpo_lab.sampler.positive_only import PositiveOnly
from msgrpo_lab.sampler.top_variance import TopVariance, spread_tiers

ONE_GROUP = np.zeros(6, dtype=int)


def draw(sampler, credit, group_index=ONE_GROUP, seed=0):
    return sampler(credit, group_index, sampler.num_episodes, np.random.default_rng(seed))


# --- DASH ----------------------------------------------------------------------------------------------------------

SMALL_AND_LARGE = credit_of([0.05, -0.5, 0.0, 2.0, -0.1, 0.09])  # kept at threshold 0.1: 1, 3, 4


@pytest.mark.parametrize(
    ("count", "inclusion"),
    [
        (2, [0, 2 / 3, 0, 2 / 3, 2 / 3, 0]),
        (3, [0, 1, 0, 1, 1, 0]),
        (5, [2 / 3, 1, 2 / 3, 1, 1, 2 / 3]),
    ],
)
def test_dash_keeps_large_advantages_and_fills_from_the_dropped(count, inclusion):
    sampler = Dash(num_episodes=count, threshold=0.1)
    np.testing.assert_allclose(draw(sampler, SMALL_AND_LARGE).inclusion, inclusion, atol=1e-15)
    np.testing.assert_allclose(frequency(sampler, SMALL_AND_LARGE, ONE_GROUP, count), inclusion, rtol=0, atol=0.04)


def test_dash_never_draws_the_dropped_with_replacement():
    assert set(draw(Dash(num_episodes=50, replace=True), SMALL_AND_LARGE).index) == {1, 3, 4}


def test_dash_that_drops_all_is_uniform():
    np.testing.assert_allclose(draw(Dash(num_episodes=3, threshold=5.0), SMALL_AND_LARGE).inclusion, [0.5] * 6)


# --- positive only -------------------------------------------------------------------------------------------------

SIGNS = credit_of([1.0, -1.0, 0.0, 0.2, -0.1, 0.0])


@pytest.mark.parametrize(
    ("count", "inclusion"),
    [
        (1, [1 / 2, 0, 0, 1 / 2, 0, 0]),
        (2, [1, 0, 0, 1, 0, 0]),
        (3, [1, 0, 1 / 2, 1, 0, 1 / 2]),
        (5, [1, 1 / 2, 1, 1, 1 / 2, 1]),
    ],
)
def test_positive_then_zero_then_negative(count, inclusion):
    sampler = PositiveOnly(num_episodes=count)
    np.testing.assert_allclose(draw(sampler, SIGNS).inclusion, inclusion, atol=1e-15)
    np.testing.assert_allclose(frequency(sampler, SIGNS, ONE_GROUP, count), inclusion, rtol=0, atol=0.04)


def test_with_replacement_only_what_is_positive():
    selection = draw(PositiveOnly(num_episodes=50, replace=True), SIGNS)
    assert set(selection.index) == {0, 3}
    np.testing.assert_array_equal(selection.inclusion, [25, 0, 0, 25, 0, 0])


# --- groups --------------------------------------------------------------------------------------------------------

# Group 4: returns 0, 2, std 1. Group 1: 3, 3. Group 7: 0, 1, std ½. Group 2: 5, 6, std ½. Episodes in mixed order.
GROUP = np.array([4, 1, 7, 2, 4, 1, 7, 2])
RETURNS = [0.0, 3.0, 0.0, 5.0, 2.0, 3.0, 1.0, 6.0]
# Â normalised by the std is ±1 in every group with spread: it no longer tells them apart.
GROUPED = credit_of([-1.0, 0.0, -1.0, -1.0, 1.0, 0.0, 1.0, 1.0], returns=RETURNS)


def test_spread_is_the_std_of_the_group_of_each_episode():
    np.testing.assert_allclose(group_spread(np.array(RETURNS), GROUP), [1, 0, 0.5, 0.5, 1, 0, 0.5, 0.5], atol=1e-15)


def test_a_group_of_equal_returns_has_no_spread_to_rounding():
    spread = group_spread(np.array([0.1 + 0.2, 0.3, 1e3 + 0.1, 1e3 + 0.1]), np.array([0, 0, 1, 1]))
    np.testing.assert_array_equal(spread, np.zeros(4))


@pytest.mark.parametrize(
    ("count", "inclusion"),
    [(3, [0.5, 0, 0.5, 0.5, 0.5, 0, 0.5, 0.5]), (6, [1, 0, 1, 1, 1, 0, 1, 1]), (7, [1, 0.5, 1, 1, 1, 0.5, 1, 1])],
)
def test_dynamic_takes_groups_with_spread_alike_and_fills_from_the_rest(count, inclusion):
    sampler = Dynamic(num_episodes=count)
    np.testing.assert_allclose(draw(sampler, GROUPED, GROUP).inclusion, inclusion, atol=1e-15)
    np.testing.assert_allclose(frequency(sampler, GROUPED, GROUP, count), inclusion, rtol=0, atol=0.04)


@pytest.mark.parametrize(
    ("keep", "tiers"),
    [
        # Four groups, by std: 4 | 7 and 2 | 1. A quarter is one group, a half would cut the tie of 7 and 2.
        (0.25, [0, 2, 1, 1, 0, 2, 1, 1]),
        (0.5, [0, 2, 1, 1, 0, 2, 1, 1]),
        (0.75, [0, 2, 0, 0, 0, 2, 0, 0]),
        (1.0, [0, 0, 0, 0, 0, 0, 0, 0]),
        (0.01, [0, 2, 1, 1, 0, 2, 1, 1]),
    ],
)
def test_tiers_of_spread(keep, tiers):
    np.testing.assert_array_equal(spread_tiers(group_spread(np.array(RETURNS), GROUP), GROUP, keep), tiers)


def test_a_tie_at_the_top_is_kept_whole():
    tiers = spread_tiers(np.array([1.0, 1.0, 1.0, 0.0]), np.arange(4), 0.25)
    np.testing.assert_array_equal(tiers, [0, 0, 0, 1])


@pytest.mark.parametrize(
    ("keep", "count", "inclusion"),
    [
        (0.25, 1, [1 / 2, 0, 0, 0, 1 / 2, 0, 0, 0]),
        (0.25, 3, [1, 0, 1 / 4, 1 / 4, 1, 0, 1 / 4, 1 / 4]),
        (0.75, 3, [1 / 2, 0, 1 / 2, 1 / 2, 1 / 2, 0, 1 / 2, 1 / 2]),
        (0.25, 7, [1, 1 / 2, 1, 1, 1, 1 / 2, 1, 1]),
    ],
)
def test_top_variance_fills_from_the_next_spread(keep, count, inclusion):
    sampler = TopVariance(num_episodes=count, keep=keep)
    np.testing.assert_allclose(draw(sampler, GROUPED, GROUP).inclusion, inclusion, atol=1e-15)
    np.testing.assert_allclose(frequency(sampler, GROUPED, GROUP, count), inclusion, rtol=0, atol=0.04)


# --- outcome -------------------------------------------------------------------------------------------------------

ONE_IN_SIX = credit_of([0.0] * 6, success=[False, True, False, False, False, False])
HALF = credit_of([0.0] * 6, success=[True, True, False, True, False, False])


@pytest.mark.parametrize(
    ("credit", "share", "count", "inclusion"),
    [
        (HALF, 0.5, 2, [1 / 3] * 6),
        (HALF, 1.0, 2, [2 / 3, 2 / 3, 0, 2 / 3, 0, 0]),
        (HALF, 0.0, 3, [0, 0, 1, 0, 1, 1]),
        # 3 · 0.5 = 1.5 successes: one or two, as likely.
        (HALF, 0.5, 3, [1 / 2] * 6),
        # 3 · 0.25 = 0.75 successes of 3 and 2.25 failures of 3
        (HALF, 0.25, 3, [1 / 4, 1 / 4, 3 / 4, 1 / 4, 3 / 4, 3 / 4]),
        # Two successes wanted and one there: it, and 3 of 5 failures.
        (ONE_IN_SIX, 0.5, 4, [3 / 5, 1, 3 / 5, 3 / 5, 3 / 5, 3 / 5]),
        # Five of six: at least two of the failures must come along.
        (HALF, 1.0, 5, [1, 1, 2 / 3, 1, 2 / 3, 2 / 3]),
    ],
)
def test_outcomes_are_drawn_in_their_share(credit, share, count, inclusion):
    sampler = OutcomeGated(num_episodes=count, success_share=share)
    np.testing.assert_allclose(draw(sampler, credit).inclusion, inclusion, atol=1e-15)
    np.testing.assert_allclose(frequency(sampler, credit, ONE_GROUP, count), inclusion, rtol=0, atol=0.04)


def test_the_number_of_successes_is_not_left_to_chance():
    sampler = OutcomeGated(num_episodes=4, success_share=0.5)
    for seed in range(50):
        assert HALF.episode_success[draw(sampler, HALF, seed=seed).index].sum() == 2


def test_outcome_gate_with_replacement_is_a_probability():
    # Half of a draw for the one success, a tenth for each failure; K = 10.
    selection = draw(OutcomeGated(num_episodes=10, replace=True), ONE_IN_SIX)
    np.testing.assert_allclose(selection.prob, [0.1, 0.5, 0.1, 0.1, 0.1, 0.1], atol=1e-15)
    np.testing.assert_allclose(selection.inclusion, [1, 5, 1, 1, 1, 1], atol=1e-12)


@pytest.mark.parametrize("won", [True, False])
@pytest.mark.parametrize("replace_drawn", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_pool_of_one_outcome_is_uniform(won, replace_drawn, share):
    credit = credit_of([0.0] * 6, success=[won] * 6)
    selection = draw(OutcomeGated(num_episodes=3, success_share=share, replace=replace_drawn), credit)
    np.testing.assert_allclose(selection.inclusion, [0.5] * 6, atol=1e-15)


# --- outcomes of a credit ------------------------------------------------------------------------------------------


def test_outcomes_are_the_rollouts_and_the_rest_is_untouched():
    batch = rollout((3, True, [turn(reward=0.5), turn(reward=1.0)]), (3, False, [turn(reward=-1.0, game_reward=7.0)]))
    credit = EpisodeReturn()(batch)
    full = with_outcomes(batch, credit)
    np.testing.assert_array_equal(full.episode_return, [1.5, -1.0])
    np.testing.assert_array_equal(full.episode_success, [True, False])
    assert full.turn_adv is credit.turn_adv
    assert full.episode_adv is credit.episode_adv


def test_outcomes_of_another_rollout_are_refused():
    batch = rollout((0, True, [turn()]))
    with pytest.raises(ValueError, match=r"shape \(6,\) and the rollout 1 episodes"):
        with_outcomes(batch, HALF)


@pytest.mark.parametrize("sampler", [PODS(num_episodes=1), Dynamic(num_episodes=1), TopVariance(num_episodes=1)])
def test_a_credit_without_returns_is_refused(sampler):
    with pytest.raises(ValueError, match=r"episode_return=None.*with_outcomes") as error:
        draw(sampler, replace(HALF, episode_return=None))
    assert "\n" not in str(error.value)


def test_a_credit_without_success_is_refused():
    with pytest.raises(ValueError, match=r"episode_success=None.*with_outcomes"):
        draw(OutcomeGated(num_episodes=1), replace(HALF, episode_success=None))


def test_a_return_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"episode_return\[1\]=nan must be finite"):
        draw(TopVariance(num_episodes=1), credit_of([0.0] * 6, returns=[0, float("nan"), 0, 0, 0, 0]))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Dash, {"threshold": 0.0}, r"sampler\.threshold=0\.0"),
        (Dash, {"threshold": float("nan")}, r"sampler\.threshold=nan"),
        (TopVariance, {"keep": 0.0}, r"sampler\.keep=0\.0"),
        (TopVariance, {"keep": 1.5}, r"sampler\.keep=1\.5"),
        (OutcomeGated, {"success_share": -0.1}, r"sampler\.success_share=-0\.1"),
        (Dynamic, {"max_refills": -1}, r"sampler\.max_refills=-1"),
        (PositiveOnly, {"num_episodes": 0}, r"sampler\.num_episodes=0"),
        (PODS, {"num_episodes": 0}, r"sampler\.num_episodes=0"),
    ],
)
def test_bad_arguments_are_named_in_one_line(make, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**({"num_episodes": 1} | arguments))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [PODS, Dash, PositiveOnly, TopVariance, Dynamic, OutcomeGated])
def test_more_than_the_pool_is_refused_without_replacement(make):
    with pytest.raises(ValueError, match=r"sampler\.num_episodes=7 exceeds the rollout's 6"):
        draw(make(num_episodes=7), HALF)
