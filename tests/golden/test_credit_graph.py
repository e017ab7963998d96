"""Distances on the merged graph and graph credit worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from credit_made import Played, rollout_of

from msgrpo_lab.credit.base import group_states_of, last_turns, turns_of
from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.credit.graph import Graph, distances_to_success

# Episode 0 wins by s, m, g. Episode 1 is lost in m, after s, m. Episode 2 goes s, x, m and is cut off.
# Distances: g 1, m 2, s 3, x 3 (by m); what cannot reach success is 4 away.
LAKE = [
    Played(rewards=[0.0, 0.0, 1.0], states="smg", success=True),
    Played(rewards=[0.0, 0.0], states="sm"),
    Played(rewards=[0.0, 0.0, 0.0], states="sxm", truncated=True),
]


def distances(episodes, groups):
    batch = rollout_of(episodes, groups)
    turns = turns_of(batch)
    success_E = np.array([played.success for played in episodes])
    states = group_states_of(batch, turns, same_turn=False)
    return distances_to_success(states, turns, last_turns(turns), success_E[turns.episode])


def adv(episodes=LAKE, groups=(0, 0, 0), **arguments):
    arguments = {"gamma": 0.5, "normalise": "none", "episode_weight": 0.0, **arguments}
    return Graph(**arguments)(rollout_of(episodes, groups)).turn_adv


def test_distances_of_the_states_left_and_led_to():
    start, end = distances(LAKE, [0, 0, 0])
    np.testing.assert_array_equal(start, [3, 2, 1, 3, 2, 3, 3, 2])
    np.testing.assert_array_equal(end, [2, 1, 0, 2, 4, 3, 2, 4])


def test_a_way_that_no_episode_walked_counts():
    # Episode 0 wins by a, b, c, d; episode 1 finds a, d and then is lost: a is two turns from success, b and c 3 and 2.
    episodes = [
        Played(rewards=[0.0] * 4, states="abcd", success=True),
        Played(rewards=[0.0] * 2, states="ad"),
    ]
    start, end = distances(episodes, [0, 0])
    np.testing.assert_array_equal(start, [2, 3, 2, 1, 2, 1])
    np.testing.assert_array_equal(end, [3, 2, 1, 0, 1, 4])
    # In a, the lost episode's turn was the better one: γ^(1 − 2 + 1) = 1 against γ^(3 − 2 + 1) = 1/4.
    np.testing.assert_allclose(adv(episodes, (0, 0))[:, 0], [-3 / 8, 3 / 8], atol=1e-15)


def test_each_group_has_a_graph_of_its_own():
    # The second group meets the same states and never wins.
    start, end = distances([*LAKE, Played(rewards=[0.0, 0.0], states="sm")], [0, 0, 0, 1])
    np.testing.assert_array_equal(start[-2:], [1, 1])
    np.testing.assert_array_equal(end[-2:], [1, 1])


def test_turns_that_change_nothing_do_not_come_nearer():
    # a, a, b and success: staying in a keeps the distance of 2.
    start, end = distances([Played(rewards=[0.0] * 3, states="aab", success=True)], [0])
    np.testing.assert_array_equal(start, [2, 2, 1])
    np.testing.assert_array_equal(end, [2, 1, 0])


def test_progress_by_the_distance_led_to():
    # γ = 1/2. In s: 1/4, 1/4, 1/8, mean 5/24 → 1/24, 1/24, −1/12. In m: 1/2 and 1/16, mean 9/32 → ±7/32; the cut-off
    # turn's state is unknown. g and x were met once.
    np.testing.assert_allclose(
        adv(relative_distance=False),
        [[1 / 24, 7 / 32, 0.0], [1 / 24, -7 / 32, 0.0], [-1 / 12, 0.0, 0.0]],
        atol=1e-15,
    )


def test_progress_from_the_state_left():
    # The same times γ^(1 − d): 4 in s, 2 in m.
    np.testing.assert_allclose(adv(), [[1 / 6, 7 / 16, 0.0], [1 / 6, -7 / 16, 0.0], [-1 / 3, 0.0, 0.0]], atol=1e-15)


def test_each_part_is_normalised_and_weighted():
    # In s deviations 1/6, 1/6, −1/3: variance (1 + 1 + 4)/36/3 = 1/18, std 0.235702260395516; in m std 7/16.
    # Returns 1, 0, 0: deviations 2/3, −1/3, −1/3, std 0.471404520791032.
    credit = Graph(gamma=0.5, step_weight=2.0, episode_weight=3.0)(rollout_of(LAKE, [0, 0, 0]))
    s, m, episode = 0.235702260395516 + 1e-6, 7 / 16 + 1e-6, 0.471404520791032 + 1e-6
    won, lost = 3 * 2 / 3 / episode, -3 / 3 / episode
    np.testing.assert_allclose(
        credit.turn_adv,
        [
            [won + 2 / 6 / s, won + 2 * 7 / 16 / m, won],
            [lost + 2 / 6 / s, lost - 2 * 7 / 16 / m, 0.0],
            [lost - 2 / 3 / s, lost, lost],
        ],
        atol=1e-9,
    )


def test_what_a_states_mean_counts_alike():
    # In a: won at once, P = 1; the other episode stays twice, P = γ^(1 − 1 + 1) = 1/2, and then wins from there, P = 1.
    episodes = [
        Played(rewards=[1.0], states="a", success=True),
        Played(rewards=[0.0, 0.0, 1.0], states="aaa", success=True, tokens=[1, 1, 4]),
    ]
    # step: (1 + 1/2 + 1/2 + 1)/4; episode: (1 + 2/3)/2; token: (1 + 1/2 + 1/2 + 4)/7
    for weighting, mean in (("step", 3 / 4), ("episode", 5 / 6), ("token", 6 / 7)):
        np.testing.assert_allclose(
            adv(episodes, (0, 0), baseline_weighting=weighting),
            [[1 - mean, 0.0, 0.0], [1 / 2 - mean, 1 / 2 - mean, 1 - mean]],
            atol=1e-15,
        )


def test_a_group_without_success_has_no_progress():
    np.testing.assert_array_equal(adv(LAKE[1:], (0, 0)), np.zeros((2, 3)))
    batch = rollout_of(LAKE[1:], [0, 0])
    np.testing.assert_array_equal(Graph()(batch).turn_adv, EpisodeReturn()(batch).turn_adv)


def test_an_episode_that_succeeds_at_the_horizon_is_not_cut_off():
    # Snake: to survive is to win, and both happen at the horizon.
    episodes = [Played(rewards=[0.0], states="a", success=True, truncated=True), Played(rewards=[0.0], states="a")]
    # P = 1 against γ^(2 − 1 + 1) = 1/4
    np.testing.assert_allclose(adv(episodes, (0, 0)), [[3 / 8], [-3 / 8]], atol=1e-15)


def test_progress_far_from_success_does_not_fade_away():
    # A chain of ten states; one episode walks it, another stays in the first state and is lost in it.
    chain = "abcdefghij"
    episodes = [
        Played(rewards=[0.0] * 9 + [1.0], states=chain, success=True),
        Played(rewards=[0.0, 0.0], states="aa", truncated=True),
    ]
    near = Graph(episode_weight=0.0)(rollout_of(episodes, [0, 0])).turn_adv
    np.testing.assert_allclose(near[:, 0], [1.0, -1.0], atol=1e-5)
    # Measured from success, γ^9 − γ^10 drowns in δ = 1e-6.
    far = Graph(episode_weight=0.0, relative_distance=False)(rollout_of(episodes, [0, 0])).turn_adv
    assert 0.0 < far[0, 0] < 1e-3


def test_the_floor_is_for_the_part_in_reward_units():
    batch = rollout_of(LAKE, [0, 0, 0])
    np.testing.assert_array_equal(
        Graph(episode_weight=0.0, min_std=10.0)(batch).turn_adv, Graph(episode_weight=0.0)(batch).turn_adv
    )
    np.testing.assert_array_equal(
        Graph(step_weight=0.0, min_std=10.0)(batch).turn_adv, EpisodeReturn(min_std=10.0)(batch).turn_adv
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.5}, r"credit\.gamma=1\.5.*\[0, 1\]"),
        ({"step_weight": -1.0}, r"credit\.step_weight=-1\.0: must lie in \[0, 1e\+06\]"),
        ({"episode_weight": -1.0}, r"credit\.episode_weight=-1\.0: must lie in \[0, 1e\+06\]"),
        ({"normalise": "batch"}, r"credit\.normalise='batch'.*std, none"),
        ({"baseline_weighting": "row"}, r"credit\.baseline_weighting='row'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        Graph(**arguments)
    assert "\n" not in str(error.value)
