"""Scripted players on held-out episodes score what the oracle says they must."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from msgrpo_lab.config.choices import Found
from msgrpo_lab.evaluation.policies import PLAYERS, player_contender
from msgrpo_lab.evaluation.scenarios import scenarios_of
from msgrpo_lab.oracle.frozen_lake import hole_avoiding_success, optimal_success, random_success
from msgrpo_lab.rollout.collect import Collector
from msgrpo_lab.rollout.held_out import Outcomes, play_held_out
from msgrpo_lab.seeding import held_out_seeds
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.snake import Snake

EXACT: dict[str, Callable[[FrozenLake], float]] = {
    "optimal": optimal_success,
    "random": random_success,
    "hole_avoiding": hole_avoiding_success,
}


@pytest.mark.parametrize("name", ["frozenlake", "frozenlake_slippery", "frozenlake_big"])
def test_players_are_within_three_standard_errors_of_the_oracle(name: str) -> None:
    """On the very maps that are played, so the error is the chance within maps alone: Σ p(1 − p) / n²."""
    (scenario,) = scenarios_of([name], {}, Found())
    game = scenario.maker()()
    assert isinstance(game, FrozenLake)
    for player, exact in EXACT.items():
        chances = []
        for seed in held_out_seeds(500):
            game.reset(seed=seed)
            chances.append(exact(game))
        opened = player_contender(player).open()
        collector = Collector(scenario.maker(), opened.prompt)
        outcomes = Outcomes.of(play_held_out(collector, opened.engine, opened.sampling(game), 500))
        chance = np.array(chances)
        error = math.sqrt(float((chance * (1 - chance)).sum())) / 500
        assert abs(outcomes.success.mean() - chance.mean()) <= 3 * error + 1e-12, player
        assert outcomes.returns.mean() == outcomes.success.mean()
        assert (outcomes.valid_turns == outcomes.turns).all(), "every word is read back as the move it is"


def test_every_player_plays_the_games_it_says_and_no_others() -> None:
    plays = {name: {game for game in (FrozenLake, Snake) if player_contender(name).plays(game)} for name in PLAYERS}
    assert plays == {
        "random": {FrozenLake, Snake},
        "optimal": {FrozenLake},
        "hole_avoiding": {FrozenLake},
        "search": {Snake},
    }
