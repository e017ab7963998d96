"""What holds on every Frozen Lake map: ordering of exact values, agreement with simulation, shape of the views."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msgrpo_lab.oracle.frozen_lake import (
    best_fixed_mix,
    fixed_mix_success,
    hole_avoiding_policy,
    hole_avoiding_success,
    optimal_action,
    optimal_success,
    optimal_values,
    policy_success,
    random_success,
)
from msgrpo_lab.tsmg.frozen_lake import FrozenLake

SEEDS = st.integers(0, 100_000)


@st.composite
def lakes(draw: st.DrawFn) -> FrozenLake:
    """A game on a random map, firm or slippery."""
    game = FrozenLake(
        size=draw(st.integers(2, 6)),
        frozen_probability=draw(st.sampled_from([0.7, 0.8, 0.9, 1.0])),
        slippery=draw(st.booleans()),
        success_rate=draw(st.sampled_from([0.0, 1 / 3, 0.8, 1.0])),
        horizon=draw(st.integers(1, 20)),
    )
    game.reset(seed=draw(SEEDS))
    return game


def random_policy(game: FrozenLake, seed: int) -> np.ndarray:
    """A policy drawn at random, some rows nearly deterministic."""
    return np.random.default_rng(seed).dirichlet(np.full(4, 0.5), size=len(game.lake.letters))


@settings(max_examples=80, deadline=None)
@given(lakes())
def test_values_are_ordered(game: FrozenLake) -> None:
    optimal = optimal_success(game)
    _, mix = best_fixed_mix([game.lake], game.horizon)
    assert 0.0 <= random_success(game) <= optimal + 1e-12
    assert mix <= optimal + 1e-12
    assert hole_avoiding_success(game) <= optimal + 1e-12
    assert optimal <= 1.0 + 1e-12


@settings(max_examples=80, deadline=None)
@given(lakes(), st.integers(0, 2**32 - 1))
def test_no_policy_beats_the_optimum(game: FrozenLake, seed: int) -> None:
    success = policy_success(game, random_policy(game, seed))
    assert -1e-12 <= success <= optimal_success(game) + 1e-12


@settings(max_examples=60, deadline=None)
@given(lakes())
def test_optimal_values_grow_with_time_and_stay_probabilities(game: FrozenLake) -> None:
    value_TS = optimal_values(game.lake, game.horizon)
    assert value_TS.shape == (game.horizon + 1, game.size**2)
    assert (np.diff(value_TS, axis=0) >= -1e-12).all()
    assert ((value_TS >= 0) & (value_TS <= 1 + 1e-12)).all()
    assert (value_TS[:, game.lake.goal] == 1).all()
    holes = [state for state, letter in enumerate(game.lake.letters) if letter == "H"]
    assert (value_TS[:, holes] == 0).all()


@settings(max_examples=60, deadline=None)
@given(lakes())
def test_following_the_optimal_actions_attains_the_optimal_value(game: FrozenLake) -> None:
    """Propagating the state distribution under `optimal_action` gives V* again: the two agree turn by turn."""
    occupancy_S = np.zeros(len(game.lake.letters))
    occupancy_S[game.lake.start] = 1.0
    for steps in range(game.horizon):
        game.steps = steps
        next_S = np.zeros_like(occupancy_S)
        for state in range(len(occupancy_S)):
            game.position = state
            if game.lake.is_terminal(state):
                next_S[state] += occupancy_S[state]
            elif occupancy_S[state]:
                next_S += occupancy_S[state] * game.lake.move_ASS[optimal_action(game), state]
        occupancy_S = next_S
    assert occupancy_S[game.lake.goal] == pytest.approx(optimal_success(game), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(lakes())
def test_fixed_mix_is_the_policy_with_equal_rows(game: FrozenLake) -> None:
    mix_A = np.random.default_rng(game.horizon).dirichlet(np.ones(4))
    rows_SA = np.tile(mix_A, (len(game.lake.letters), 1))
    assert fixed_mix_success(game, mix_A) == pytest.approx(policy_success(game, rows_SA), abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(lakes(), st.lists(st.integers(0, 10), min_size=3, max_size=3).map(sorted))
def test_no_mix_in_tenths_beats_the_best_one(game: FrozenLake, cuts: list[int]) -> None:
    mix_A = np.diff([0, *cuts, 10]) / 10
    assert fixed_mix_success(game, mix_A) <= best_fixed_mix([game.lake], game.horizon)[1] + 1e-12


@settings(max_examples=60, deadline=None)
@given(lakes())
def test_firm_ice_is_won_iff_the_shortest_path_fits(game: FrozenLake) -> None:
    if game.slippery:
        return
    size, rows = game.size, game.lake.rows
    distance = {0: 0}
    frontier = [0]
    for state in frontier:
        row, column = divmod(state, size)
        for next_row, next_column in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            cell = next_row * size + next_column
            if 0 <= next_row < size and 0 <= next_column < size and cell not in distance:
                if rows[next_row][next_column] == "H":
                    continue
                distance[cell] = distance[state] + 1
                frontier.append(cell)
    assert optimal_success(game) == float(distance[game.lake.goal] <= game.horizon)


@pytest.mark.parametrize("slippery", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_propagation_agrees_with_simulation(seed: int, slippery: bool) -> None:
    """A random memoryless policy, played 1,500 times through `step`: within 4 standard errors of the exact value."""
    game = FrozenLake(size=3, frozen_probability=0.9, slippery=slippery, horizon=10, shaping=0.0)
    game.reset(seed=seed)
    policy_SA = 0.5 * hole_avoiding_policy(game.lake) + 0.5 * random_policy(game, seed)
    exact = policy_success(game, policy_SA)
    cumulative_SA = policy_SA.cumsum(axis=1)
    rng, wins, episodes = np.random.default_rng(seed), 0, 1500
    for member in range(episodes):
        game.reset(seed=seed, options={"member": member})
        done, info = False, {}
        while not done:
            action = min(int(np.searchsorted(cumulative_SA[game.position], rng.random(), side="right")), 3)
            _, _, terminated, truncated, info = game.step(action)
            done = terminated or truncated
        wins += info["success"]
    assert 0.02 < exact < 0.999, "an uninformative case"
    assert abs(wins / episodes - exact) < 4 * np.sqrt(exact * (1 - exact) / episodes)


@settings(max_examples=60, deadline=None)
@given(lakes())
def test_transition_rows_are_distributions_and_ends_absorb(game: FrozenLake) -> None:
    move_ASS = game.lake.move_ASS
    np.testing.assert_allclose(move_ASS.sum(axis=2), 1.0, atol=1e-12)
    for state in range(len(game.lake.letters)):
        if game.lake.is_terminal(state):
            assert (move_ASS[:, state, state] == 1.0).all()
    assert set(game.lake.open_S) == {s for s in range(len(game.lake.letters)) if game.lake.letters[s] in "SF"}


@settings(max_examples=60, deadline=None)
@given(lakes())
def test_paper_view_tells_states_apart_and_compact_view_tells_the_neighbours(game: FrozenLake) -> None:
    lake = game.lake
    assert len(set(lake.paper_texts)) == len(lake.letters)
    for state in lake.open_S:
        row, column = divmod(int(state), lake.size)
        shown = dict(line.split(": ") for line in lake.compact_texts[state].splitlines())
        for word, (down, right) in {"Left": (0, -1), "Up": (-1, 0), "Down": (1, 0), "Right": (0, 1)}.items():
            inside = 0 <= row + down < lake.size and 0 <= column + right < lake.size
            letter = lake.rows[row + down][column + right] if inside else None
            assert shown[word] == {None: "wall", "H": "hole", "G": "goal", "S": "ice", "F": "ice"}[letter]


@settings(max_examples=60, deadline=None)
@given(lakes(), st.lists(st.sampled_from([None, 0, 1, 2, 3]), max_size=12), st.integers(0, 12))
def test_forks_share_the_past_and_nothing_else(game: FrozenLake, actions: list[int | None], at: int) -> None:
    """Playing on from a snapshot is as if the detour after it had never been."""
    done = False
    for action in actions[:at]:
        if done:
            break
        done = game.step(action)[2] or game.steps >= game.horizon
    if done:
        return
    snapshot = game.snapshot()
    straight = game.step(0)
    game.restore(snapshot)
    game.step(2)
    game.restore(snapshot)
    assert game.step(0) == straight
