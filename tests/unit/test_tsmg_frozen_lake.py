"""Frozen Lake: its texts word for word, and its dynamics against gymnasium's own environment."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv, generate_random_map

from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.lake import (
    Lake,
    compact_rules,
    compact_state,
    lake,
    paper_rules,
    paper_state,
    random_map,
    relative_rules,
    relative_state,
)

LEFT, DOWN, RIGHT, UP = range(4)
MAP = ("SFFF", "FHFH", "FFFH", "HFFG")


def on(rows: tuple[str, ...], position: int = 0, **arguments: object) -> FrozenLake:
    """A game on a drawn map."""
    game = FrozenLake(**{"size": len(rows), "shaping": 0.0, **arguments})
    game.reset(seed=0)
    game._set_state((rows, position))
    return game


def test_the_measured_prompt_word_for_word() -> None:
    # The state of the prompt the default recipe was measured with: one cell a line, Left, Up, Down, Right.
    assert compact_state(("SFFF", "FFFF", "FFHF", "FFFG"), 6) == (
        "Goal: 2 down and 1 right\nLeft: ice\nUp: ice\nDown: hole\nRight: ice"
    )


@pytest.mark.parametrize(
    ("position", "lines"),
    [
        (0, ["Goal: 3 down and 3 right", "Left: wall", "Up: wall", "Down: ice", "Right: ice"]),
        (1, ["Goal: 3 down and 2 right", "Left: ice", "Up: wall", "Down: hole", "Right: ice"]),
        (3, ["Goal: 3 down", "Left: ice", "Up: wall", "Down: hole", "Right: wall"]),
        (10, ["Goal: 1 down and 1 right", "Left: ice", "Up: ice", "Down: ice", "Right: hole"]),
        (14, ["Goal: 1 right", "Left: ice", "Up: ice", "Down: wall", "Right: goal"]),
        (5, ["You fell into a hole."]),
        (15, ["You reached the goal."]),
    ],
)
def test_compact_view_of_every_kind_of_cell(position: int, lines: list[str]) -> None:
    assert compact_state(MAP, position).splitlines() == lines


@pytest.mark.parametrize(
    ("position", "holes"),
    [
        (0, "Holes: 1 down and 1 right; 3 down; 1 down and 3 right; 2 down and 3 right"),
        (4, "Holes: 1 right; 2 down; 3 right; 1 down and 3 right"),
        (10, "Holes: 1 right; 1 up and 1 left; 1 up and 1 right; 1 down and 2 left"),
    ],
)
def test_relative_view_is_the_compact_one_and_every_hole(position: int, holes: str) -> None:
    assert relative_state(MAP, position) == f"{compact_state(MAP, position)}\n{holes}"


def test_relative_view_without_holes_and_at_the_end() -> None:
    assert relative_state(("SF", "FG"), 0).splitlines()[-1] == "Holes: none"
    assert relative_state(MAP, 5) == "You fell into a hole."
    assert "The lake is 4 by 4" in relative_rules(size=4, slippery=False)


def test_compact_view_is_partial() -> None:
    """Two different states that read the same: the view's ceiling is below the game's."""
    near_trap = ("SFFFF", "FFFFF", "FFFFF", "FFFFH", "FFFHG")
    harmless = ("SFFFF", "FFFFF", "FFFFF", "FFFFF", "FFFFG")
    assert compact_state(near_trap, 0) == compact_state(harmless, 0)


@pytest.mark.parametrize("slippery", [False, True])
def test_compact_rules_mention_slipping_only_where_it_happens(slippery: bool) -> None:
    text = compact_rules(slippery=slippery)
    assert text.startswith("Frozen Lake. Reach the goal, avoid holes.")
    assert ("slippery" in text) == slippery


def test_paper_view_word_for_word() -> None:
    assert paper_state(MAP, 4).splitlines() == [
        "Player: (1, 0)",
        "Goal: (3, 3)",
        "Holes: (1, 1), (1, 3), (2, 3), (3, 0)",
        "Grid:",
        ". . . .",
        "P H . H",
        ". . . H",
        "H . . G",
        "Legend: P = player, G = goal, H = hole, . = ice",
    ]


def test_paper_view_without_holes() -> None:
    assert "Holes: none" in paper_state(("SF", "FG"), 0)


def test_paper_rules_tell_the_slip_probabilities() -> None:
    text = paper_rules(size=4, slippery=True, success_rate=0.8, horizon=15)
    assert "with probability 0.80 you move" in text
    assert "probability 0.10 each" in text
    assert "15 moves" in text
    assert "not slippery" in paper_rules(size=4, slippery=False, success_rate=0.8, horizon=8)


@pytest.mark.parametrize("size", [2, 4, 6])
@pytest.mark.parametrize("probability", [0.6, 0.8, 1.0])
def test_maps_are_gymnasiums(size: int, probability: float) -> None:
    for seed in range(10):
        assert random_map(size, probability, seed) == tuple(generate_random_map(size=size, p=probability, seed=seed))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("slippery", "success_rate"), [(False, 1 / 3), (True, 1 / 3), (True, 0.8), (True, 0.0)])
def test_steps_are_gymnasiums_side_by_side(seed: int, slippery: bool, success_rate: float) -> None:
    """With the same generator both environments visit the same cells, turn by turn."""
    game = FrozenLake(
        size=5, frozen_probability=0.9, slippery=slippery, success_rate=success_rate, horizon=60, shaping=0.0
    )
    other = FrozenLakeEnv(
        desc=generate_random_map(size=5, p=0.9, seed=seed), is_slippery=slippery, success_rate=success_rate
    )
    actions = np.random.default_rng(seed)
    for member in range(5):
        game.reset(seed=seed, options={"member": member})
        other.reset(seed=0)
        other.np_random.bit_generator.state = game.dynamics.bit_generator.state
        done = False
        while not done:
            action = int(actions.integers(4))
            _, reward, terminated, truncated, _ = game.step(action)
            position, other_reward, other_terminated, _, _ = other.step(action)
            assert (game.position, reward, terminated) == (position, other_reward, other_terminated)
            done = terminated or truncated


@pytest.mark.parametrize("slippery", [False, True])
def test_table_is_gymnasiums(slippery: bool) -> None:
    own = Lake(MAP, slippery=slippery, success_rate=0.5)
    env = FrozenLakeEnv(desc=list(MAP), is_slippery=slippery, success_rate=0.5)
    for state in range(16):
        for action in range(4):
            expected = np.zeros(16)
            for probability, following, _, _ in env.P[state][action]:
                expected[following] += probability
            np.testing.assert_allclose(own.move_ASS[action, state], expected, atol=1e-15)


@pytest.mark.parametrize(
    ("uniform", "cell"), [(0.0, 0), (0.24, 0), (0.25, 3), (0.26, 3), (0.74, 3), (0.75, 1), (0.76, 1), (0.999, 1)]
)
def test_slip_follows_the_cumulative_probabilities(uniform: float, cell: int) -> None:
    # Down from the start with success 0.5. Outcomes stand in the order Left (bumps: stays on 0) up to 0.25, Down (to 3)
    # up to 0.75, Right (to 1).
    flat = Lake(("SFF", "FFF", "FFG"), slippery=True, success_rate=0.5)
    assert flat.draw(0, DOWN, uniform)[1] == cell


def test_a_number_past_the_rounded_sum_takes_the_first_outcome() -> None:
    # gymnasium's argmax over all-false is 0; three thirds may sum to less than 1.
    flat = Lake(("SFF", "FFF", "FFG"), slippery=True, success_rate=0.5)
    assert flat.draw(0, DOWN, 1.0) == flat.outcomes[0][DOWN][0]


def test_members_of_a_group_slip_apart_on_one_map() -> None:
    game = FrozenLake(frozen_probability=0.9, slippery=True, horizon=15)
    maps, paths = set(), set()
    for member in range(16):
        game.reset(seed=3, options={"member": member})
        maps.add(game.lake.key)
        path = []
        done = False
        while not done:
            _, _, terminated, truncated, _ = game.step(RIGHT)
            path.append(game.position)
            done = terminated or truncated
        paths.add(tuple(path))
    assert len(maps) == 1
    assert len(paths) > 4


def test_slips_are_not_the_maps_own_stream() -> None:
    """The map is drawn from gymnasium's stream of the seed; slips of member 0 must not repeat it."""
    game = FrozenLake(slippery=True)
    game.reset(seed=5)
    assert not np.array_equal(game.dynamics.random(4), np.random.Generator(np.random.PCG64(5)).random(4))


def test_firm_ice_draws_nothing() -> None:
    game = FrozenLake(slippery=False)
    game.reset(seed=0)
    game.step(RIGHT)
    assert game.snapshot().dynamics_state is None


def test_goal_pays_ends_and_succeeds() -> None:
    game = on(MAP, 14)
    text, reward, terminated, truncated, info = game.step(RIGHT)
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    assert text == "You reached the goal."


def test_hole_pays_nothing_ends_and_fails() -> None:
    game = on(MAP, 4)
    _, reward, terminated, truncated, info = game.step(RIGHT)
    assert (reward, terminated, truncated, info["success"]) == (0.0, True, False, False)


def test_goal_on_the_last_turn_is_termination_and_success() -> None:
    game = on(MAP, 14, horizon=1)
    _, _, terminated, truncated, info = game.step(RIGHT)
    assert (terminated, truncated, info["success"]) == (True, False, True)


def test_wall_costs_a_turn_and_moves_nobody() -> None:
    game = on(MAP, 0)
    game.step(UP)
    assert (game.position, game.steps) == (0, 1)


@pytest.mark.parametrize(
    ("position", "potential"), [(0, 0.0), (1, 1 / 6), (10, 4 / 6), (14, 5 / 6), (5, 0.0), (15, 0.0)]
)
def test_potential_by_hand(position: int, potential: float) -> None:
    # Furthest distance on 4×4 is 6; hole and goal are terminal and have Φ = 0.
    assert on(MAP, position).potential() == pytest.approx(potential)


def test_shaped_reward_by_hand() -> None:
    game = FrozenLake(shaping=0.1, shaping_gamma=0.9)
    game.reset(seed=0)
    game._set_state((MAP, 0))
    # From Φ = 0 to Φ = 1/6: 0.1 · (0.9/6 − 0).
    assert game.step(RIGHT)[1] == pytest.approx(0.1 * 0.9 / 6)
    # Into the hole below: Φ′ = 0, so 0.1 · (0 − 1/6).
    assert game.step(DOWN)[1] == pytest.approx(-0.1 / 6)


def test_truncated_episode_keeps_its_last_potential() -> None:
    game = FrozenLake(shaping=1.0, horizon=1)
    game.reset(seed=0)
    game._set_state((MAP, 0))
    _, reward, terminated, truncated, _ = game.step(RIGHT)
    assert (terminated, truncated) == (False, True)
    assert reward == pytest.approx(1 / 6)


def test_state_key_holds_the_map_and_the_cell_but_not_the_time() -> None:
    game = on(MAP, 0)
    start = game.state_key()
    game.step(UP)
    assert game.state_key() == start
    game.step(RIGHT)
    assert game.state_key() != start
    assert on(("SFFF", "FFFF", "FFFF", "FFFG"), 0).state_key() != start


def test_maps_and_lakes_are_built_once() -> None:
    assert random_map(4, 0.8, 1) is random_map(4, 0.8, 1)
    assert lake(MAP, False, 1 / 3) is lake(MAP, False, 1 / 3)
    assert lake(MAP, True, 1 / 3) is not lake(MAP, False, 1 / 3)


def test_map_before_reset_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"reset\(seed"):
        FrozenLake().render_text()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("frozen_probability", 0.2),
        ("frozen_probability", 1.2),
        ("success_rate", -0.1),
        ("success_rate", 1.1),
        ("slippery", 1),
        ("slippery", "yes"),
    ],
)
def test_mistaken_lake_argument_is_told_in_one_line(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"env\.{key}={value!r}: must be [^\n]*$"):
        FrozenLake(**{key: value})


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63])
def test_any_seed_from_zero_up_is_a_seed(seed: int) -> None:
    game = FrozenLake()
    assert game.reset(seed=seed)[1]["seed"] == seed
    assert game.lake.rows == tuple(generate_random_map(size=4, p=0.8, seed=seed))


def test_numpy_integers_are_seeds_and_actions_too() -> None:
    game, other = FrozenLake(slippery=True), FrozenLake(slippery=True)
    game.reset(seed=np.int64(7))
    other.reset(seed=7)
    assert game.step(np.int64(2)) == other.step(2)


def test_text_of_a_state_is_rendered_once() -> None:
    """Thousands of episodes an update: the same string object comes back."""
    game = FrozenLake()
    game.reset(seed=0)
    assert game.render_text() is game.render_text()
