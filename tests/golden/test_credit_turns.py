"""Which statistic a turn belongs to and how much it counts there, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from credit_made import Played, rollout_of

from msgrpo_lab.credit.base import (
    episode_weights,
    group_states_of,
    last_turns,
    matrix_of,
    pairs_of,
    states_of,
    turn_weights,
    turns_of,
)

BATCH = rollout_of(
    [
        Played(rewards=[1.0, 2.0], states=["a", ("b", 1)], tokens=[1, 2]),
        Played(rewards=[3.0], states=["a"], tokens=[4]),
        Played(rewards=[4.0, 5.0, 6.0], states=["a", "a", ("b", 1)], tokens=[3, 5, 7]),
    ],
    [9, 2, 9],
)


def test_turns_stand_side_by_side():
    turns = turns_of(BATCH)
    np.testing.assert_array_equal(turns.episode, [0, 0, 1, 2, 2, 2])
    np.testing.assert_array_equal(turns.turn, [0, 1, 0, 0, 1, 2])
    np.testing.assert_array_equal(turns.group, [1, 1, 0, 1, 1, 1])
    np.testing.assert_array_equal(last_turns(turns), [False, True, True, False, False, True])
    np.testing.assert_array_equal(turns.reward[turns.mask], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    np.testing.assert_array_equal(matrix_of(turns.reward[turns.mask], turns.mask), turns.reward)


def test_states_are_the_same_by_equality_and_within_a_group():
    turns = turns_of(BATCH)
    np.testing.assert_array_equal(states_of(BATCH), [0, 1, 0, 0, 0, 1])
    same = group_states_of(BATCH, turns, same_turn=False)
    assert len(set(same)) == 3
    assert same[0] == same[3] == same[4] != same[2]
    timed = group_states_of(BATCH, turns, same_turn=True)
    assert timed[0] == timed[3]
    assert len(set(timed)) == 5


def test_pairs_are_numbered_from_zero():
    np.testing.assert_array_equal(pairs_of(np.array([0, 5, 0, 5]), np.array([7, 0, 7, 1])), [0, 1, 0, 2])
    assert pairs_of(np.array([], dtype=int), np.array([], dtype=int)).size == 0


@pytest.mark.parametrize(
    ("weighting", "by_group", "by_state"),
    [
        ("step", [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]),
        # Episode 2 has three turns in its group, and two visits to a.
        ("episode", [1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3], [1, 1, 1, 1 / 2, 1 / 2, 1]),
        ("token", [1, 2, 4, 3, 5, 7], [1, 2, 4, 3, 5, 7]),
    ],
)
def test_how_much_a_turn_counts(weighting, by_group, by_state):
    turns = turns_of(BATCH)
    np.testing.assert_allclose(turn_weights(BATCH, turns, turns.group, weighting), by_group, atol=1e-15)
    states = group_states_of(BATCH, turns, same_turn=False)
    np.testing.assert_allclose(turn_weights(BATCH, turns, states, weighting), by_state, atol=1e-15)


def test_how_much_an_episode_counts():
    assert episode_weights(BATCH, "episode") is None
    np.testing.assert_array_equal(episode_weights(BATCH, "step"), [2, 1, 3])
    np.testing.assert_array_equal(episode_weights(BATCH, "token"), [3, 4, 15])
