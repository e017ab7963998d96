"""Frozen Lake's exact values against cases worked out by hand, brute force, and the scenarios' known numbers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import yaml

from msgrpo_lab.oracle.compact import TextTable, compact_ceiling
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
from msgrpo_lab.tsmg.lake import Lake

LEFT, DOWN, RIGHT, UP = range(4)
CONF = Path(__file__).parents[2] / "conf" / "env"


def on(rows: tuple[str, ...], **arguments: object) -> FrozenLake:
    game = FrozenLake(**{"size": len(rows), "shaping": 0.0, **arguments})
    game.reset(seed=0)
    game._set_state((rows, 0))
    return game


def scenario(name: str) -> FrozenLake:
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    del settings["_target_"]
    return FrozenLake(**settings)


# 2×2 without holes, firm ice: S F / F G. Cells 0 1 / 2 3.
#   Uniform play: from 0, Left and Up stay, Down → 2, Right → 1. From 1 or 2 exactly one of four actions reaches 3, one
#   goes back to 0 and two stay. Let x_t, y_t be P(success) from 0 and from {1, 2} with t turns left.
#     x_0 = y_0 = 0;  x_t = (x_{t−1} + y_{t−1}) / 2;  y_t = 1/4 + y_{t−1}/2 + x_{t−1}/4
#     t = 1: x = 0,     y = 1/4
#     t = 2: x = 1/8,   y = 1/4 + 1/8 + 0 = 3/8
#     t = 3: x = 1/4,   y = 1/4 + 3/16 + 1/32 = 15/32
#     t = 4: x = 23/64, y = …
FREE = ("SF", "FG")


@pytest.mark.parametrize(("horizon", "expected"), [(1, 0.0), (2, 1 / 8), (3, 1 / 4), (4, 23 / 64)])
def test_random_success_by_hand(horizon: int, expected: float) -> None:
    assert random_success(on(FREE, horizon=horizon)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("horizon", "expected"), [(1, 0.0), (2, 1.0), (8, 1.0)])
def test_firm_ice_is_won_as_soon_as_the_path_fits(horizon: int, expected: float) -> None:
    assert optimal_success(on(FREE, horizon=horizon)) == expected


# Down and Right at random on FREE: the first turn always leaves the start, and from 1 Down wins (1/2), Right stays.
#   With t turns left at 1 or 2: 1 − 2^−t. From the start with H turns: 1 − 2^−(H−1).
@pytest.mark.parametrize(("horizon", "expected"), [(1, 0.0), (2, 1 / 2), (3, 3 / 4), (5, 15 / 16)])
def test_fixed_mix_by_hand(horizon: int, expected: float) -> None:
    mix_A = np.array([0.0, 0.5, 0.5, 0.0])
    assert fixed_mix_success(on(FREE, horizon=horizon), mix_A) == pytest.approx(expected, abs=1e-15)


# Slippery 2×2, S H / F G, success_rate 0.5. From 0, Down goes to 2 with 1/2, Left (bump, stays) 1/4, Right (hole) 1/4;
# Left: stays 1/2, Down 1/4 → 2, Up stays 1/4: never a hole. From 2, Right: goal 1/2, Up → 0 1/4, Down stays 1/4;
# Down: stays 1/2, Left stays 1/4, Right → goal 1/4; Right is never worse.
#   x_t from 0, y_t from 2: y_1 = 1/2; x_1 = 0
#   t = 2: x: Down y_1/2 + x_1/4 = 1/4, Left x_1·3/4 + y_1/4 = 1/8 → 1/4;  y = 1/2 + x_1/4 + y_1/4 = 5/8
#   t = 3: x: Down 5/16 + 1/16 = 3/8, Left 3/16 + 5/32 = 11/32 → 3/8;      y = 1/2 + 1/16 + 5/32 = 23/32
#   t = 4: x: Down 23/64 + 3/32 = 29/64, Left 9/32 + 23/128 = 59/128 → 59/128: now patience pays.
SLIPPERY = ("SH", "FG")


@pytest.mark.parametrize(("horizon", "expected"), [(1, 0.0), (2, 1 / 4), (3, 3 / 8), (4, 59 / 128)])
def test_optimal_success_on_slippery_ice_by_hand(horizon: int, expected: float) -> None:
    game = on(SLIPPERY, slippery=True, success_rate=0.5, horizon=horizon)
    assert optimal_success(game) == pytest.approx(expected, abs=1e-15)


def test_optimal_action_changes_with_the_turns_left() -> None:
    game = on(SLIPPERY, slippery=True, success_rate=0.5, horizon=4)
    assert optimal_action(game) == LEFT
    game.steps = 1
    assert optimal_action(game) == DOWN
    game.steps, game.position = 3, 2
    assert optimal_action(game) == RIGHT


def test_ties_of_the_optimum_go_to_the_lowest_action() -> None:
    # From 2 with two turns left: Right 1/2 + y_1/4 = 5/8, Down 1/4 + (3/4)·y_1 = 5/8.
    game = on(SLIPPERY, slippery=True, success_rate=0.5, horizon=4)
    game.steps, game.position = 2, 2
    assert optimal_action(game) == DOWN


def test_optimal_values_of_every_state_and_time() -> None:
    game = on(SLIPPERY, slippery=True, success_rate=0.5, horizon=3)
    expected_TS = [
        [0, 0, 0, 1],
        [0, 0, 1 / 2, 1],
        [1 / 4, 0, 5 / 8, 1],
        [3 / 8, 0, 23 / 32, 1],
    ]
    np.testing.assert_allclose(optimal_values(game.lake, 3), expected_TS, atol=1e-15)


def test_optimal_values_are_shared_and_read_only() -> None:
    values_TS = optimal_values(on(FREE).lake, 8)
    with pytest.raises(ValueError, match="read-only"):
        values_TS[0, 0] = 1.0


def test_policy_success_by_hand() -> None:
    # FREE, Right at 0 always, at 1 Down with 3/4 else Right (stays): P = 1 − (1/4)^(H − 1).
    policy_SA = np.zeros((4, 4))
    policy_SA[0, RIGHT] = 1.0
    policy_SA[1, [DOWN, RIGHT]] = [0.75, 0.25]
    policy_SA[2:, LEFT] = 1.0
    assert policy_success(on(FREE, horizon=3), policy_SA) == pytest.approx(15 / 16, abs=1e-15)


@pytest.mark.parametrize(("slippery", "horizon"), [(False, 4), (True, 3)])
def test_random_success_equals_the_average_over_all_action_sequences(slippery: bool, horizon: int) -> None:
    """Brute force: every sequence of actions, every chain of outcomes."""
    game = on(("SFF", "FHF", "FFG"), slippery=slippery, horizon=horizon)
    lake = game.lake

    def success(state: int, actions: tuple[int, ...]) -> float:
        if lake.is_terminal(state) or not actions:
            return float(state == lake.goal)
        row_S = lake.move_ASS[actions[0], state]
        return sum(float(row_S[following]) * success(following, actions[1:]) for following in np.flatnonzero(row_S))

    sequences = list(itertools.product(range(4), repeat=horizon))
    expected = sum(success(lake.start, sequence) for sequence in sequences) / len(sequences)
    assert random_success(game) == pytest.approx(expected, abs=1e-12)


def test_no_deterministic_memoryless_policy_beats_the_optimum() -> None:
    """Brute force over all 4^3 policies of the slippery 2×2: the best one is below the time-dependent optimum."""
    game = on(SLIPPERY, slippery=True, success_rate=0.5, horizon=4)
    best = 0.0
    for actions in itertools.product(range(4), repeat=2):
        policy_SA = np.full((4, 4), 0.25)
        policy_SA[0], policy_SA[2] = np.eye(4)[actions[0]], np.eye(4)[actions[1]]
        best = max(best, policy_success(game, policy_SA))
    # Down at every t: t = 4 gives 29/64; Left at every t gives less. The optimum is 59/128.
    assert best == pytest.approx(29 / 64, abs=1e-12)
    assert best < optimal_success(game)


# Hole-avoiding policy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "cell", "expected"),
    [
        (("SFF", "FFF", "FFG"), 0, [0, 0.5, 0.5, 0]),  # two ways closer: a tie at random
        (("SHF", "FFF", "FFG"), 0, [0, 1, 0, 0]),  # one of them a hole
        (("SFF", "FFF", "FFG"), 2, [0, 1, 0, 0]),  # at the right edge only down is closer
        (("SFF", "FFH", "FHG"), 4, [0.5, 0, 0, 0.5]),  # both ways closer are holes: back, at random
        (("SFF", "FFF", "FFG"), 7, [0, 0, 1, 0]),  # next to the goal
        (("SHF", "HFF", "FFG"), 0, [0.25, 0.25, 0.25, 0.25]),  # an island: whatever
    ],
)
def test_hole_avoiding_policy_by_hand(rows: tuple[str, ...], cell: int, expected: list[float]) -> None:
    lake = Lake(rows, slippery=False, success_rate=1 / 3)
    np.testing.assert_allclose(hole_avoiding_policy(lake)[cell], expected)


def test_hole_avoiding_policy_reads_only_the_compact_text() -> None:
    row_of: dict[str, tuple[float, ...]] = {}
    game = FrozenLake()
    for seed in range(100):
        game.reset(seed=seed)
        policy_SA = hole_avoiding_policy(game.lake)
        for state in game.lake.open_S:
            row = tuple(policy_SA[state])
            assert row_of.setdefault(game.lake.compact_texts[state], row) == row


# Best fixed mix and compact ceiling ---------------------------------------------------------------------------------


def test_best_fixed_mix_by_hand() -> None:
    # FREE with two turns: P = 2·p_down·p_right, largest at one half each.
    mix_A, success = best_fixed_mix([on(FREE).lake], 2)
    np.testing.assert_allclose(mix_A, [0, 0.5, 0.5, 0])
    assert success == pytest.approx(0.5)


def test_best_fixed_mix_is_what_the_mix_scores() -> None:
    game = FrozenLake(slippery=True, frozen_probability=0.9, horizon=15)
    lakes, games = [], []
    for seed in range(5):
        game.reset(seed=seed)
        lakes.append(game.lake)
        games.append(game.snapshot())
    mix_A, success = best_fixed_mix(lakes, 15)
    scores = []
    for snapshot in games:
        game.restore(snapshot)
        scores.append(fixed_mix_success(game, mix_A))
    assert success == pytest.approx(np.mean(scores), abs=1e-12)


def test_compact_ceiling_finds_the_stochastic_optimum_of_two_aliased_maps() -> None:
    """The start reads the same on both maps, and the way is opposite: the best memoryless policy tosses a coin.

    A wrong first move is seen and taken back, at the price of two turns; with six turns one mistake is affordable. With
    p the probability of Right at the start, one map is won with p + (1 − p)p, the other with (1 − p) + p(1 − p): the
    mean (1 + 2p(1 − p))/2 is 3/4 at p = 1/2, and 1/2 for either deterministic choice.
    """
    right_first = Lake(("SFF", "FHF", "HHG"), slippery=False, success_rate=1 / 3)
    down_first = Lake(("SFH", "FHH", "FFG"), slippery=False, success_rate=1 / 3)
    assert right_first.compact_texts[0] == down_first.compact_texts[0]
    found = compact_ceiling([right_first, down_first], 6)
    assert found.success == pytest.approx(3 / 4, abs=5e-3)
    start_A = found.prob_XA[found.texts.index(right_first.compact_texts[0])]
    np.testing.assert_allclose(start_A, [0, 0.5, 0.5, 0], atol=0.02)


@pytest.mark.parametrize("slippery", [False, True])
def test_gradient_of_a_text_policy_is_that_of_finite_differences(slippery: bool) -> None:
    """Success is a polynomial in the policy's numbers, so that central differences are good to many digits."""
    game = FrozenLake(size=3, slippery=slippery, horizon=5)
    lakes = []
    for seed in range(4):
        game.reset(seed=seed)
        lakes.append(game.lake)
    table = TextTable(lakes, 5)
    prob_XA = np.random.default_rng(0).dirichlet(np.ones(4), size=len(table.texts))
    _, gradient_XA, visits_X = table.evaluate(prob_XA)
    numeric_XA = np.zeros_like(prob_XA)
    for index in np.ndindex(*prob_XA.shape):
        step_XA = np.zeros_like(prob_XA)
        step_XA[index] = 1e-5
        numeric_XA[index] = (table.evaluate(prob_XA + step_XA)[0] - table.evaluate(prob_XA - step_XA)[0]) / 2e-5
    np.testing.assert_allclose(gradient_XA, numeric_XA, atol=1e-9)
    assert np.abs(gradient_XA).max() > 0.01
    assert visits_X[table.index.row_of[lakes[0].compact_texts[0]]] >= 1 / 4, "the first turn is spent at a start"


def test_compact_ceiling_success_is_its_policys_own() -> None:
    game = FrozenLake()
    lakes = []
    for seed in range(20):
        game.reset(seed=seed)
        lakes.append(game.lake)
    found = compact_ceiling(lakes, game.horizon, iterations=20)
    row_of = dict(zip(found.texts, found.prob_XA, strict=True))
    scores = []
    for seed in range(20):
        game.reset(seed=seed)
        policy_SA = np.array([row_of.get(text, np.full(4, 0.25)) for text in game.lake.compact_texts])
        scores.append(policy_success(game, policy_SA))
    assert found.success == pytest.approx(np.mean(scores), abs=1e-12)


@pytest.mark.parametrize("name", ["frozenlake", "frozenlake_slippery", "frozenlake_big"])
def test_compact_ceiling_lies_between_hole_avoiding_and_optimal(name: str) -> None:
    game = scenario(name)
    lakes, optimal, hole_avoiding = [], [], []
    for seed in range(30):
        game.reset(seed=seed)
        lakes.append(game.lake)
        optimal.append(optimal_success(game))
        hole_avoiding.append(hole_avoiding_success(game))
    success = compact_ceiling(lakes, game.horizon).success
    assert np.mean(hole_avoiding) < success < np.mean(optimal)


def test_compact_ceiling_of_the_default_game() -> None:
    """About 0.92 on these maps: above the hole-avoiding player's 0.84, below the game's 1."""
    game = scenario("frozenlake")
    lakes = []
    for seed in range(50):
        game.reset(seed=seed)
        lakes.append(game.lake)
    assert compact_ceiling(lakes, game.horizon).success == pytest.approx(0.925, abs=0.005)


@pytest.mark.parametrize("maps", [[], [("SF", "FG"), ("SFF", "FFF", "FFG")]])
def test_compact_ceiling_refuses_nothing_and_a_mixture(maps: list[tuple[str, ...]]) -> None:
    lakes = [Lake(rows, slippery=False, success_rate=1 / 3) for rows in maps]
    with pytest.raises(ValueError, match=f"lakes: {len(maps)} maps"):
        compact_ceiling(lakes, 4)


# The scenarios' known numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "random", "optimal"),
    [("frozenlake", 0.007, 1.0), ("frozenlake_slippery", 0.060, 0.361), ("frozenlake_big", 0.002, 0.038)],
)
def test_scenarios_are_as_hard_as_known(name: str, random: float, optimal: float) -> None:
    game = scenario(name)
    scores = []
    for seed in range(200):
        game.reset(seed=seed)
        scores.append((random_success(game), optimal_success(game)))
    mean_random, mean_optimal = np.mean(scores, axis=0)
    assert mean_random == pytest.approx(random, rel=0.2)
    assert mean_optimal == pytest.approx(optimal, rel=0.05)


def test_reference_players_of_the_default_game_are_as_measured() -> None:
    game = scenario("frozenlake")
    lakes, hole_avoiding = [], []
    for seed in range(200):
        game.reset(seed=seed)
        lakes.append(game.lake)
        hole_avoiding.append(hole_avoiding_success(game))
    mix_A, ignoring = best_fixed_mix(lakes, game.horizon)
    assert ignoring == pytest.approx(0.27, abs=0.03)
    np.testing.assert_allclose(mix_A, [0, 0.5, 0.5, 0])
    assert np.mean(hole_avoiding) == pytest.approx(0.86, abs=0.03)


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy_SA", "words"),
    [
        (np.full((3, 4), 0.25), r"has shape \(3, 4\); must be \(4, 4\)"),
        (np.full((4, 4), 0.3), "must|distribution"),
        (np.tile([1.5, -0.5, 0.0, 0.0], (4, 1)), "distribution"),
    ],
)
def test_what_is_no_policy_is_told(policy_SA: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=f"action_prob_SA: .*({words})"):
        policy_success(on(FREE), policy_SA)


def test_optimal_action_after_the_end_is_told() -> None:
    game = on(FREE, horizon=2)
    game.step(RIGHT)
    game.step(DOWN)
    with pytest.raises(ValueError, match="episode is over"):
        optimal_action(game)
