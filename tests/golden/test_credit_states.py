"""GiGPO and HGPO advantages worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from credit_made import Played, rollout_of

from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.credit.gigpo import GiGPO
from msgrpo_lab.credit.hgpo import HGPO

# γ = 1/2. Episode 0 goes a, b with rewards (0, 1): turn returns 1/2, 1. Episode 1 goes a, a with (0, 0): 0, 0.
# Returns 1 and 0: deviations ±1/2. State a holds 1/2, 0, 0: mean 1/6, deviations 1/3, −1/6, −1/6. State b was met once.
ANCHORED = [
    Played(rewards=[0.0, 1.0], states="ab", tokens=[2, 9]),
    Played(rewards=[0.0, 0.0], states="aa", tokens=[1, 3]),
]


def test_gigpo_adds_the_comparison_in_the_same_state():
    credit = GiGPO(gamma=0.5, normalise="none")(rollout_of(ANCHORED, [0, 0]))
    np.testing.assert_allclose(credit.turn_adv, [[5 / 6, 1 / 2], [-2 / 3, -2 / 3]], atol=1e-15)


def test_gigpo_normalises_each_part():
    # Episode std 1/2; state a: variance (4 + 1 + 1)/36/3 = 1/18, std 0.235702260395516.
    credit = GiGPO(gamma=0.5)(rollout_of(ANCHORED, [0, 0]))
    one, std = 0.5 / (0.5 + 1e-6), 0.235702260395516 + 1e-6
    np.testing.assert_allclose(
        credit.turn_adv, [[one + 1 / 3 / std, one], [-one - 1 / 6 / std, -one - 1 / 6 / std]], atol=1e-9
    )


def test_gigpo_weighs_the_step_part():
    credit = GiGPO(gamma=0.5, normalise="none", step_weight=3.0)(rollout_of(ANCHORED, [0, 0]))
    np.testing.assert_allclose(credit.turn_adv, [[3 / 2, 1 / 2], [-1.0, -1.0]], atol=1e-15)


@pytest.mark.parametrize(
    ("weighting", "step_part"),
    [
        ("step", [1 / 3, -1 / 6]),
        ("episode", [1 / 4, -1 / 4]),  # episode 1 counts once though it was there twice
        ("token", [1 / 3, -1 / 6]),  # 2, 1 and 3 tokens: mean (2·1/2)/6 = 1/6 too
    ],
)
def test_what_a_states_mean_counts_alike(weighting, step_part):
    credit = GiGPO(gamma=0.5, normalise="none", baseline_weighting=weighting)(rollout_of(ANCHORED, [0, 0]))
    np.testing.assert_allclose(credit.turn_adv[:, 0], [0.5 + step_part[0], -0.5 + step_part[1]], atol=1e-15)


def test_a_states_mean_weighted_by_token():
    # As above with 6, 1 and 1 tokens in state a: mean (6/2)/8 = 3/8 → 1/8, −3/8.
    episodes = [Played(rewards=[0.0, 1.0], states="ab", tokens=[6, 9]), Played(rewards=[0.0, 0.0], states="aa")]
    credit = GiGPO(gamma=0.5, normalise="none", baseline_weighting="token")(rollout_of(episodes, [0, 0]))
    np.testing.assert_allclose(credit.turn_adv, [[5 / 8, 1 / 2], [-7 / 8, -7 / 8]], atol=1e-15)


def test_gigpo_of_states_at_the_same_turn():
    # State a at turn 0: 1/2 and 0 → ±1/4; at turn 1 episode 1 is alone.
    credit = GiGPO(gamma=0.5, normalise="none", same_turn=True)(rollout_of(ANCHORED, [0, 0]))
    np.testing.assert_allclose(credit.turn_adv, [[3 / 4, 1 / 2], [-3 / 4, -1 / 2]], atol=1e-15)


def test_gigpo_does_not_compare_groups():
    # Another group that meets the same state a, with returns 8 and 10: ∓1 for the episode, ∓1 in the state.
    others = [Played(rewards=[8.0], states="a"), Played(rewards=[10.0], states="a")]
    credit = GiGPO(gamma=0.5, normalise="none")(rollout_of([*ANCHORED, *others], [0, 0, 1, 1]))
    np.testing.assert_allclose(credit.turn_adv, [[5 / 6, 1 / 2], [-2 / 3, -2 / 3], [-2.0, 0.0], [2.0, 0.0]], atol=1e-15)


def test_gigpo_where_no_state_is_met_twice_is_ms_grpo():
    episodes = [Played(rewards=[0.0, 1.0], states="ab"), Played(rewards=[0.0, 0.0], states="cd")]
    batch = rollout_of(episodes, [0, 0])
    np.testing.assert_array_equal(GiGPO()(batch).turn_adv, EpisodeReturn()(batch).turn_adv)


def test_gigpo_gives_equal_turn_returns_of_a_state_exactly_nothing():
    episodes = [Played(rewards=[0.1 + 0.2], states="a"), Played(rewards=[0.1, 0.2, 0.0], states="abc")]
    credit = GiGPO(gamma=1.0)(rollout_of(episodes, [0, 0]))
    np.testing.assert_array_equal(credit.turn_adv, np.zeros((2, 3)))


# Undiscounted, one reward at the end. Episode 0 goes a, b for 1; episode 1 goes a, b for 0; episode 2 goes c, b for 4.
# Level 0: a holds 1, 0 → ±1/2; b holds 1, 0, 4: mean 5/3 → −2/3, −5/3, 7/3; c is alone.
# Level 1: (a, b) holds 1, 0 → ±1/2; (c, b) is alone.
HISTORIES = [
    Played(rewards=[0.0, 1.0], states="ab"),
    Played(rewards=[0.0, 0.0], states="ab"),
    Played(rewards=[0.0, 4.0], states="cb"),
]


def test_hgpo_averages_levels_by_depth():
    # Weights 1 and 2: turn 1 of episode 0 gets (−2/3 + 2·1/2)/3 = 1/9, of episode 1 (−5/3 − 2·1/2)/3 = −8/9.
    # Where only level 0 tells something it counts alone.
    credit = HGPO(history=1, gamma=1.0, normalise="none")(rollout_of(HISTORIES, [0, 0, 0]))
    np.testing.assert_allclose(credit.turn_adv, [[1 / 2, 1 / 9], [-1 / 2, -8 / 9], [0.0, 7 / 3]], atol=1e-15)


def test_hgpo_with_equal_level_weights():
    # (−2/3 + 1/2)/2 = −1/12 and (−5/3 − 1/2)/2 = −13/12
    credit = HGPO(history=1, alpha=0.0, gamma=1.0, normalise="none")(rollout_of(HISTORIES, [0, 0, 0]))
    np.testing.assert_allclose(credit.turn_adv[:, 1], [-1 / 12, -13 / 12, 7 / 3], atol=1e-15)


def test_hgpo_normalises_each_level():
    # b: variance (4 + 25 + 49)/9/3 = 26/9, std 1.699673171197595; (a, b): std 1/2.
    credit = HGPO(history=1, gamma=1.0)(rollout_of(HISTORIES, [0, 0, 0]))
    flat, deep = 1.699673171197595 + 1e-6, 0.5 / (0.5 + 1e-6)
    np.testing.assert_allclose(
        credit.turn_adv[:, 1],
        [(-2 / 3 / flat + 2 * deep) / 3, (-5 / 3 / flat - 2 * deep) / 3, 7 / 3 / flat],
        atol=1e-12,
    )


def test_hgpo_skips_a_level_without_spread():
    # Episodes 0 and 1 both earn 1: (a, b) tells nothing, so level 0 counts alone: 1 − 2, 1 − 2, 4 − 2.
    episodes = [HISTORIES[0], HISTORIES[0], HISTORIES[2]]
    credit = HGPO(history=1, gamma=1.0, normalise="none")(rollout_of(episodes, [0, 0, 0]))
    np.testing.assert_allclose(credit.turn_adv, [[0.0, -1.0], [0.0, -1.0], [0.0, 2.0]], atol=1e-15)


def test_hgpo_looks_back_as_far_as_it_is_told():
    # a, b, c for 1; d, b, c for 0; e, f, c for 4. In c: level 0 as b above, level 1 (b, c) as (a, b) above.
    episodes = [
        Played(rewards=[0.0, 0.0, 1.0], states="abc"),
        Played(rewards=[0.0, 0.0, 0.0], states="dbc"),
        Played(rewards=[0.0, 0.0, 4.0], states="efc"),
    ]
    credit = HGPO(history=2, gamma=1.0, normalise="none")(rollout_of(episodes, [0, 0, 0]))
    np.testing.assert_allclose(credit.turn_adv[:, 2], [1 / 9, -8 / 9, 7 / 3], atol=1e-15)
    # With the same state two turns before, level 2 counts 3: (−2/3 + 2/2 + 3/2)/6 = 11/36.
    episodes[1] = Played(rewards=[0.0, 0.0, 0.0], states="abc")
    credit = HGPO(history=2, gamma=1.0, normalise="none")(rollout_of(episodes, [0, 0, 0]))
    np.testing.assert_allclose(credit.turn_adv[0, 2], 11 / 36, atol=1e-15)


def test_hgpo_does_not_look_back_into_another_episode():
    # One-turn episodes a, b, a, b, c, b: in b returns 0, 2, 4. None has a turn before.
    episodes = [Played(rewards=[r], states=s) for s, r in zip("ababcb", [0.0, 0.0, 0.0, 2.0, 0.0, 4.0], strict=True)]
    credit = HGPO(gamma=1.0, normalise="none")(rollout_of(episodes, [0] * 6))
    np.testing.assert_allclose(credit.turn_adv[:, 0], [0.0, -2.0, 0.0, 0.0, 0.0, 2.0], atol=1e-15)


def test_hgpo_of_states_at_the_same_turn():
    # a for 2; b, a for 0; b, a for 1. In a at any turn: 2, 0, 1, and in b 0, 1. At the same turn 2 is alone in a.
    episodes = [Played(rewards=[2.0], states="a"), *(Played(rewards=[0.0, r], states="ba") for r in (0.0, 1.0))]
    for same_turn, expected in (
        (False, [[1, 0], [-1 / 2, -1], [1 / 2, 0]]),
        (True, [[0, 0], [-1 / 2] * 2, [1 / 2] * 2]),
    ):
        rule = HGPO(history=0, gamma=1.0, normalise="none", same_turn=same_turn)
        np.testing.assert_allclose(rule(rollout_of(episodes, [0, 0, 0])).turn_adv, expected, atol=1e-15)


def test_hgpo_with_the_episodes_advantage():
    # Returns 1, 0, 4: deviations −2/3, −5/3, 7/3, added twice.
    credit = HGPO(history=1, gamma=1.0, normalise="none", episode_weight=2.0)(rollout_of(HISTORIES, [0, 0, 0]))
    np.testing.assert_allclose(credit.turn_adv[:, 1], [1 / 9 - 4 / 3, -8 / 9 - 10 / 3, 7.0], atol=1e-14)


def test_hgpo_discounts_turn_returns():
    # γ = 1/2: a holds 1/2 and 0.
    credit = HGPO(history=1, gamma=0.5, normalise="none")(rollout_of(HISTORIES, [0, 0, 0]))
    np.testing.assert_allclose(credit.turn_adv[:, 0], [1 / 4, -1 / 4, 0.0], atol=1e-15)


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (GiGPO, {"gamma": -0.5}, r"credit\.gamma=-0\.5.*\[0, 1\]"),
        (GiGPO, {"step_weight": -1.0}, r"credit\.step_weight=-1\.0: must lie in \[0, "),
        (GiGPO, {"normalise": "batch"}, r"credit\.normalise='batch'.*std, none"),
        (GiGPO, {"baseline_weighting": "row"}, r"credit\.baseline_weighting='row'"),
        (HGPO, {"history": -1}, r"credit\.history=-1.*\[0, 1000\]"),
        (HGPO, {"alpha": -1.0}, r"credit\.alpha=-1\.0.*\[0, 64\]"),
        (HGPO, {"gamma": 2.0}, r"credit\.gamma=2\.0.*\[0, 1\]"),
        (HGPO, {"episode_weight": float("nan")}, r"credit\.episode_weight=nan"),
        (HGPO, {"delta": 0.0}, r"credit\.delta=0\.0"),
        (HGPO, {"baseline_weighting": "row"}, r"credit\.baseline_weighting='row'"),
    ],
)
def test_bad_arguments_are_named(rule, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        rule(**arguments)
    assert "\n" not in str(error.value)
