"""Forked continuations: against Frozen Lake's exact values, reproducible, and less noisy where the chance is shared."""

from __future__ import annotations

import numpy as np
import pytest

from msgrpo_lab.oracle.forked import ForkedValues, forked_values
from msgrpo_lab.oracle.lake_values import INVALID, index_texts, lake_model, lakes_of, policy_values
from msgrpo_lab.oracle.players import FixedPlayer, RandomPlayer, SearchPlayer, TextPlayer
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.snake import Snake


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def snake(seed: int = 0, **arguments: object) -> Snake:
    game = Snake(**{"size": 6, "num_apples": 3, "horizon": 8, **arguments})
    game.reset(seed=seed)
    return game


@pytest.mark.parametrize(("slippery", "fallback"), [(True, "random"), (False, "random"), (True, "Down")])
def test_forked_values_are_frozen_lakes_exact_ones(slippery: bool, fallback: str) -> None:
    """From the start and from two turns on: Q, V and A of a policy with ⊥, within 4 standard errors."""
    game = FrozenLake(slippery=slippery, success_rate=0.6, fallback_action=fallback, horizon=6, shaping=0.3)
    model = lake_model(game, lakes_of(game, [3]))
    index = index_texts(model.lakes, game.observation)
    prob_XB = generator(1).dirichlet(np.ones(5), size=len(index.texts))
    values = policy_values(model, index.spread(prob_XB))
    player = TextPlayer(dict(zip(index.texts, prob_XB, strict=True)))
    game.reset(seed=3)
    judged = 0
    for turn, answer in enumerate((2, 1, None)):
        found = forked_values(game, player, generator(turn), continuations=1500)
        place = (0, turn, game.position)
        for (mean, error), exact in (
            (found.action_value_A, values.action_value_MTSB[place][:INVALID]),
            (found.value, values.value_MTS[place]),
            (found.advantage_A, values.advantage_MTSB[place][:INVALID]),
        ):
            assert (np.abs(mean - exact) <= 4 * np.asarray(error) + 1e-12).all()
            judged += 1
        _, _, terminated, _, _ = game.step(answer)
        if terminated:
            break
    assert judged >= 6
    assert np.ptp(values.action_value_MTSB[0, 0, 0, :INVALID]) > 0.02, (
        "or a wrong order of the actions would not be seen"
    )


def test_the_same_generator_gives_the_same_values_and_another_does_not() -> None:
    game = snake()
    one, same, other = (forked_values(game, RandomPlayer(), generator(seed), continuations=20) for seed in (3, 3, 4))
    assert (one.return_AN == same.return_AN).all()
    assert (one.own_return_N == same.own_return_N).all()
    assert (one.return_AN != other.return_AN).any()


def test_the_game_goes_on_as_if_nothing_had_been_asked() -> None:
    asked, plain = snake(7), snake(7)
    forked_values(asked, RandomPlayer(), generator(), continuations=5)
    for action in (0, 2, 1, 3):
        seen = [game.step(action) for game in (asked, plain)]
        assert seen[0] == seen[1]
        if seen[0][2]:
            break


def test_more_continuations_begin_with_the_fewer() -> None:
    """Continuation n depends on the generator and n alone, so that a sample can be enlarged."""
    game = snake(1)
    few, many = (forked_values(game, RandomPlayer(), generator(), continuations=n) for n in (4, 9))
    assert (many.return_AN[:, :4] == few.return_AN).all()


def test_a_player_that_always_answers_the_same_has_that_actions_value() -> None:
    """Common random numbers to the bit: its own first move is the forced one, with the same chance after it."""
    game = snake(2)
    found = forked_values(game, FixedPlayer("Left"), generator(), continuations=30)
    assert (found.own_return_N == found.return_AN[game.legal_actions.index("Left")]).all()
    mean_A, error_A = found.advantage_A
    assert mean_A[2] == error_A[2] == 0
    free = forked_values(game, FixedPlayer("Left"), generator(), continuations=30, common_random_numbers=False)
    assert (free.own_return_N != free.return_AN[2]).any()


@pytest.mark.parametrize("player", [RandomPlayer(), SearchPlayer()], ids=["random", "search"])
def test_common_random_numbers_reduce_the_variance_of_differences(player: RandomPlayer | SearchPlayer) -> None:
    """Over ten Snake positions, advantages have clearly less variance at the same price, and the same expectation."""
    shared, free, gaps = [], [], []
    for seed in range(10):
        game = snake(seed, size=10, num_apples=5)
        with_crn, without = (
            forked_values(game, player, generator(seed), continuations=40, common_random_numbers=common)
            for common in (True, False)
        )
        shared.append(np.mean(with_crn.advantage_A[1] ** 2))
        free.append(np.mean(without.advantage_A[1] ** 2))
        error_A = np.hypot(with_crn.advantage_A[1], without.advantage_A[1])
        gaps.append((np.abs(with_crn.advantage_A[0] - without.advantage_A[0]) <= 4 * error_A + 1e-12).all())
    assert np.mean(shared) < 0.8 * np.mean(free)
    assert all(gaps)


def test_means_errors_and_differences_by_hand() -> None:
    found = ForkedValues(return_AN=np.array([[1.0, 3.0], [0.0, 0.0]]), own_return_N=np.array([1.0, 0.0]))
    assert found.value == (0.5, 0.5)
    mean_A, error_A = found.action_value_A
    assert mean_A.tolist() == [2, 0]
    assert error_A.tolist() == pytest.approx([1, 0])
    mean_A, error_A = found.advantage_A
    assert mean_A.tolist() == [1.5, -0.5]
    assert error_A.tolist() == pytest.approx([1.5, 0.5])
    mean_AA, error_AA = found.difference_AA
    assert mean_AA.tolist() == [[0, 2], [-2, 0]]
    np.testing.assert_allclose(error_AA, [[0, 1], [1, 0]])


def test_one_continuation_and_an_ended_episode_are_refused() -> None:
    game = snake(horizon=1)
    with pytest.raises(ValueError, match="continuations=1: a standard error needs at least 2"):
        forked_values(game, RandomPlayer(), generator(), continuations=1)
    game.step(0)
    with pytest.raises(ValueError, match="the episode is over; fork a state before its end"):
        forked_values(game, RandomPlayer(), generator(), continuations=2)


def test_text_player_draws_from_its_row_and_says_bottom() -> None:
    game = FrozenLake()
    game.reset(seed=0)
    player = TextPlayer({game.render_text(): np.array([0.5, 0.0, 0.3, 0.0, 0.2])})
    rng = generator()
    answers = [game.text_to_action(player(game, rng)) for _ in range(2000)]
    assert {a: answers.count(a) for a in set(answers)} == {
        0: pytest.approx(1000, abs=100),
        2: pytest.approx(600, abs=90),
        None: pytest.approx(400, abs=80),
    }
    with pytest.raises(ValueError, match="TextPlayer: knows 0 texts, not 'Goal"):
        TextPlayer({})(game, rng)
