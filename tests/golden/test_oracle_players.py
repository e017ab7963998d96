"""Reference players and scores: hand-drawn positions, exact numbers, and agreement with simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest

from msgrpo_lab.oracle.frozen_lake import fixed_mix_success, hole_avoiding_success, optimal_success, random_success
from msgrpo_lab.oracle.players import (
    FixedPlayer,
    HoleAvoidingPlayer,
    MixPlayer,
    OptimalPlayer,
    Player,
    RandomPlayer,
    Score,
    SearchPlayer,
    baseline_names,
    play,
    reference_scores,
    simulate,
)
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.snake import Snake
from msgrpo_lab.tsmg.snake_rules import Board


def snake_at(**changes: object) -> Snake:
    board = Board(**{"size": 5, "player": ((2, 2),), "others": (), "apples": (), "bananas": (), **changes})
    game = Snake(size=5, num_apples=len(board.apples), num_bananas=len(board.bananas), apple_reward=1.0)
    game.reset(seed=0)
    game._set_state(board)
    return game


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_random_player_plays_every_word() -> None:
    game, rng = FrozenLake(), generator()
    words = [RandomPlayer()(game, rng) for _ in range(400)]
    assert {word: words.count(word) > 60 for word in game.legal_actions} == dict.fromkeys(game.legal_actions, True)


def test_fixed_player_plays_its_word_legal_or_not() -> None:
    assert FixedPlayer("Left")(FrozenLake(), generator()) == "Left"
    game = FrozenLake(fallback_action="Down")
    game.reset(seed=0)
    assert game.step(game.text_to_action(FixedPlayer("sideways")(game, generator())))[4]["invalid"]


def test_mix_player_draws_from_its_distribution() -> None:
    player, rng = MixPlayer({"Left": 0.7, "Up": 0.0, "Right": 0.3}), generator()
    words = [player(FrozenLake(), rng) for _ in range(2000)]
    assert set(words) == {"Left", "Right"}
    assert words.count("Left") == pytest.approx(1400, abs=90)


@pytest.mark.parametrize("probabilities", [{}, {"Left": 0.5}, {"Left": 1.5, "Up": -0.5}])
def test_mix_player_refuses_what_is_no_distribution(probabilities: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be non-negative and sum to 1"):
        MixPlayer(probabilities)


@pytest.mark.parametrize(
    ("player", "exact"),
    [
        (RandomPlayer(), random_success),
        (HoleAvoidingPlayer(), hole_avoiding_success),
        (OptimalPlayer(), optimal_success),
        (
            MixPlayer({"Down": 0.25, "Right": 0.75}),
            lambda game: fixed_mix_success(game, np.array([0.0, 0.25, 0.75, 0.0])),
        ),
    ],
    ids=["random", "hole_avoiding", "optimal", "mix"],
)
@pytest.mark.parametrize("slippery", [False, True])
def test_players_score_what_the_oracle_says(
    player: Player, exact: Callable[[FrozenLake], float], slippery: bool
) -> None:
    game = FrozenLake(slippery=slippery, frozen_probability=0.9, horizon=15)
    for seed in (0, 5):
        game.reset(seed=seed)
        expected = exact(game)
        wins = sum(play(game, player, seed, member, np.random.default_rng(member))[1] for member in range(600))
        error = np.sqrt(max(expected * (1 - expected), 1e-9) / 600)
        assert abs(wins / 600 - expected) < 4 * error + 1e-12


@pytest.mark.parametrize("player", [HoleAvoidingPlayer(), OptimalPlayer()])
def test_frozen_lake_players_refuse_other_games(player: Player) -> None:
    with pytest.raises(ValueError, match=rf"{type(player).__name__}: plays FrozenLake only, not Snake"):
        player(Snake(), generator())


def test_search_player_refuses_other_games() -> None:
    with pytest.raises(ValueError, match="SearchPlayer: plays Snake only, not FrozenLake"):
        SearchPlayer()(FrozenLake(), generator())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"apples": ((2, 4),)}, {"Right"}),
        ({"apples": ((0, 2),)}, {"Up"}),
        ({"apples": ((4, 2), (2, 1))}, {"Left"}),  # the nearer one
        ({"bananas": ((2, 0),)}, {"Left"}),
        # Own body in the way: (2, 3) is the neck, so the way to (2, 4) goes round it.
        ({"player": ((2, 2), (2, 3), (3, 3), (3, 2)), "apples": ((2, 4),)}, {"Up"}),
        # Another snake's body bars the direct way up.
        ({"others": (((1, 1), (1, 2), (1, 3)),), "apples": ((0, 2),)}, {"Right"}),
    ],
)
def test_search_player_takes_a_shortest_safe_path(changes: dict[str, object], words: set[str]) -> None:
    game = snake_at(**changes)
    assert {SearchPlayer()(game, np.random.default_rng(seed)) for seed in range(5)} <= words


def test_search_player_stays_out_of_danger() -> None:
    # The apple is two to the right, but the other head may enter the cell between.
    game = snake_at(others=(((1, 3), (0, 3), (0, 4)),), apples=((2, 4),))
    assert SearchPlayer()(game, generator()) == "Down"


def test_search_player_walks_around_poison() -> None:
    board = Board(size=3, player=((1, 0),), others=(), apples=((1, 1),), bananas=((1, 2),))
    game = Snake(size=3, num_apples=1, num_bananas=1, other_snakes=0, apple_reward=-1.0)
    game.reset(seed=0)
    game._set_state(board)
    assert SearchPlayer()(game, generator()) in {"Up", "Down"}


def test_search_player_plans_around_poison_further_on() -> None:
    # P . A B   Going right ends between two poisons; the way leads down and round.
    # . A . .
    board = Board(size=4, player=((0, 0),), others=(), apples=((0, 2), (1, 1)), bananas=((0, 3),))
    game = Snake(size=4, num_apples=2, num_bananas=1, other_snakes=0, apple_reward=-1.0)
    game.reset(seed=0)
    game._set_state(board)
    assert SearchPlayer()(game, generator()) == "Down"


def test_search_player_without_food_keeps_alive() -> None:
    # In the corner with its body beside it there is one way that is no death.
    game = snake_at(player=((0, 0), (1, 0), (1, 1), (2, 1)))
    assert {SearchPlayer()(game, np.random.default_rng(seed)) for seed in range(10)} == {"Right"}


def test_search_player_prefers_poison_to_death() -> None:
    board = Board(size=3, player=((0, 0), (1, 0), (1, 1), (2, 1)), others=(), apples=((0, 1),), bananas=())
    game = Snake(size=3, num_apples=1, other_snakes=0, apple_reward=-1.0)
    game.reset(seed=0)
    game._set_state(board)
    assert SearchPlayer()(game, generator()) == "Right"


def test_search_player_asked_after_death_is_told() -> None:
    with pytest.raises(ValueError, match="snake is dead"):
        SearchPlayer()(snake_at(player=()), generator())


# Reference scores ---------------------------------------------------------------------------------------------------


def test_frozen_lake_scores_are_exact_and_in_order() -> None:
    scores = reference_scores(FrozenLake, range(50), generator())
    assert list(scores) == ["random", "ignores_prompt", "hole_avoiding", "optimal", "compact_ceiling"]
    assert all(score.exact and score.standard_error == 0.0 for score in scores.values())
    assert all(score.return_mean == score.success_rate for score in scores.values())
    order = ["random", "ignores_prompt", "hole_avoiding", "compact_ceiling", "optimal"]
    values = [scores[name].return_mean for name in order]
    assert values == sorted(values)
    assert scores["optimal"].return_mean == 1.0


def test_frozen_lake_scores_need_no_chance() -> None:
    first = reference_scores(FrozenLake, range(5), np.random.default_rng(0))
    assert first == reference_scores(FrozenLake, range(5), np.random.default_rng(1))


def test_frozen_lake_scores_are_means_over_the_seeds() -> None:
    def make() -> TextGame:
        return FrozenLake(slippery=True)

    both = reference_scores(make, [3, 4], generator())
    singles = [reference_scores(make, [seed], generator()) for seed in (3, 4)]
    for name in ("random", "hole_avoiding", "optimal"):
        assert both[name].return_mean == pytest.approx(np.mean([single[name].return_mean for single in singles]))


def test_the_complete_view_has_no_compact_ceiling() -> None:
    assert "compact_ceiling" not in reference_scores(lambda: FrozenLake(observation="paper"), range(3), generator())


@pytest.fixture(scope="module")
def snake_scores() -> dict[str, Score]:
    return reference_scores(Snake, range(50), generator())


def test_scores_are_of_the_unshaped_unpenalised_game() -> None:
    plain, shaped = Snake(shaping=0.0, invalid_penalty=0.0), Snake(shaping=5.0, invalid_penalty=9.0)
    for player in (RandomPlayer(), FixedPlayer("sideways")):
        scores = [simulate(game, player, range(20), generator(), episodes=100) for game in (plain, shaped)]
        assert scores[0] == scores[1]


def test_snake_scores_are_simulated_and_in_order(snake_scores: dict[str, Score]) -> None:
    assert list(snake_scores) == ["random", "ignores_prompt", "search"]
    assert not any(score.exact for score in snake_scores.values())
    assert all(0 < score.standard_error < 0.1 for score in snake_scores.values())
    random, ignoring, search = (score.return_mean for score in snake_scores.values())
    assert random <= ignoring < search - 1


def test_ends_of_the_normalised_score_are_among_the_references(snake_scores: dict[str, Score]) -> None:
    assert baseline_names(Snake()) == ("random", "search")
    assert baseline_names(FrozenLake()) == ("random", "optimal")
    assert set(baseline_names(Snake())) <= set(snake_scores)
    assert set(baseline_names(FrozenLake())) <= set(reference_scores(FrozenLake, range(2), generator()))


def test_poison_scenario_is_survived_by_the_search_player() -> None:
    score = simulate(Snake(apple_reward=-1.0, horizon=20), SearchPlayer(), range(20), generator(), episodes=200)
    assert score.return_mean == pytest.approx(0.0, abs=0.05)
    assert score.success_rate > 0.95


def test_simulated_scores_repeat_under_one_seed() -> None:
    first = simulate(Snake(), RandomPlayer(), range(10), generator(), episodes=100)
    assert first == simulate(Snake(), RandomPlayer(), range(10), generator(), episodes=100)


def test_standard_error_covers_the_truth() -> None:
    """The exact success of random play on slippery ice lies within 4 standard errors of the simulated mean."""
    game = FrozenLake(slippery=True, frozen_probability=0.9, horizon=15)
    exact = []
    for seed in range(20):
        game.reset(seed=seed)
        exact.append(random_success(game))
    score = simulate(game, RandomPlayer(), range(20), generator(), episodes=2000)
    assert 0.002 < score.standard_error < 0.01
    assert abs(score.return_mean - np.mean(exact)) < 4 * score.standard_error


def test_simulate_spreads_its_episodes_over_the_seeds() -> None:
    played: list[int] = []

    class Counting(FrozenLake):
        def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
            played.append(seed)
            return super().reset(seed=seed, options=options)

    simulate(Counting(), FixedPlayer("Right"), [1, 2, 3], generator(), episodes=10)
    assert [played.count(seed) for seed in (1, 2, 3)] == [4, 4, 4]


def test_a_game_without_a_known_upper_end_is_told() -> None:
    class Foreign:
        """Stands for a game of another package."""

    with pytest.raises(ValueError, match="Foreign: no upper reference is known"):
        baseline_names(cast("TextGame", Foreign()))


def test_no_seeds_are_told() -> None:
    with pytest.raises(ValueError, match=r"seeds=\[\]: no initial states"):
        reference_scores(FrozenLake, [], generator())
