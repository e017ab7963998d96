"""Reference scores of a scenario: what a learner's score is to be read against.

All scores are of the game itself: unshaped and without ⊥ penalties. Frozen Lake's are exact. Snake's are simulated, and
its upper end is a search player, named as a reference and not as the optimum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from msgrpo_lab.oracle.compact import compact_ceiling
from msgrpo_lab.oracle.frozen_lake import (
    best_fixed_mix,
    hole_avoiding_success,
    optimal_success,
    random_success,
)
from msgrpo_lab.oracle.players import MixPlayer, Player, RandomPlayer, SearchPlayer
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.snake import Snake

_EPISODES = 1000
_CANDIDATE_EPISODES = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How a reference player does on the given seeds."""

    return_mean: float
    """Mean game return of an episode."""
    success_rate: float
    """Share of episodes with success, or its probability."""
    standard_error: float
    """Monte-Carlo standard error of `return_mean` for these seeds; 0.0 when exact."""
    exact: bool
    """Whether the score was computed instead of simulated."""


def baseline_names(game: TextGame) -> tuple[str, str]:
    """Names of the players at 0 and at 1 of the normalised score, (score − low) / (high − low).

    Raises:
        ValueError: no upper end is known for this game.
    """
    if isinstance(game, FrozenLake):
        return "random", "optimal"
    if isinstance(game, Snake):
        return "random", "search"
    raise ValueError(f"{type(game).__name__}: no upper reference is known; report raw scores, or add one to the oracle")


def reference_scores(
    make_game: Callable[[], TextGame], seeds: Sequence[int], rng: np.random.Generator
) -> dict[str, Score]:
    """Scores of the reference players on the initial states of `seeds`.

    Frozen Lake (exact): `random`, `ignores_prompt` (best fixed mix of actions for these very maps), `hole_avoiding`,
    `optimal`, and with the compact view `compact_ceiling` (the best policy on texts that was found: a lower bound of
    what the view allows). Other games (simulated, at least 1000 episodes a player): `random`, `ignores_prompt` (the
    best of eleven fixed mixes, chosen and then scored on separate episodes), and for Snake `search`.

    Args:
        make_game: makes a game of the scenario.
        seeds: initial states; the scores are means over them.
        rng: all chance of simulated players and games.

    Raises:
        ValueError: there are no seeds.
    """
    if not seeds:
        raise ValueError("seeds=[]: no initial states; give at least one seed")
    game = make_game()
    if isinstance(game, FrozenLake):
        return _frozen_lake_scores(game, seeds)
    random_rng, mix_rng, search_rng = rng.spawn(3)
    random = simulate(game, RandomPlayer(), seeds, random_rng)
    mix = simulate(game, _best_mix_player(game, seeds, mix_rng), seeds, mix_rng)
    # The random player ignores the prompt too, so that chance in the choice must not put the best mix below it.
    scores = {"random": random, "ignores_prompt": max(random, mix, key=lambda score: score.return_mean)}
    if isinstance(game, Snake):
        scores["search"] = simulate(game, SearchPlayer(), seeds, search_rng)
    return scores


def play(game: TextGame, player: Player, seed: int, member: int, rng: np.random.Generator) -> tuple[float, bool]:
    """One episode of `player`: its game return and success. `member` picks the game's stream of chance events."""
    game.reset(seed=seed, options={"member": member})
    total, done, success = 0.0, False, False
    while not done:
        _, _, terminated, truncated, info = game.step(game.text_to_action(player(game, rng)))
        total += info["game_reward"]
        success = info["success"]
        done = terminated or truncated
    return total, success


def simulate(
    game: TextGame, player: Player, seeds: Sequence[int], rng: np.random.Generator, *, episodes: int = _EPISODES
) -> Score:
    """Score of `player` from at least `episodes` episodes, spread evenly over the seeds, two or more each.

    The standard error is that of the mean over these seeds: only the spread within a seed counts.
    """
    members = max(2, math.ceil(episodes / len(seeds)))
    # Streams of chance of their own, so that a player is not scored on the very events an evaluation will draw.
    first = int(rng.integers(2**31))
    played = [[play(game, player, seed, first + i, rng) for i in range(members)] for seed in seeds]
    return_NM = np.array([[total for total, _ in row] for row in played])
    return Score(
        return_mean=float(return_NM.mean()),
        success_rate=float(np.mean([[success for _, success in row] for row in played])),
        standard_error=float(np.sqrt(return_NM.var(axis=1, ddof=1).mean() / return_NM.size)),
        exact=False,
    )


def _frozen_lake_scores(game: FrozenLake, seeds: Sequence[int]) -> dict[str, Score]:
    lakes, values = [], []
    for seed in seeds:
        game.reset(seed=seed)
        lakes.append(game.lake)
        values.append((random_success(game), hole_avoiding_success(game), optimal_success(game)))
    random, hole_avoiding, optimal = np.mean(values, axis=0).tolist()
    _, ignores_prompt = best_fixed_mix(lakes, game.horizon)
    success = {
        "random": random,
        "ignores_prompt": ignores_prompt,
        "hole_avoiding": hole_avoiding,
        "optimal": optimal,
    }
    if game.observation == "compact":
        success["compact_ceiling"] = compact_ceiling(lakes, game.horizon).success
    return {
        name: Score(return_mean=value, success_rate=value, standard_error=0.0, exact=True)
        for name, value in success.items()
    }


def _best_mix_player(game: TextGame, seeds: Sequence[int], rng: np.random.Generator) -> MixPlayer:
    """The best of the fixed words, their half-and-half mixes and the uniform mix, by simulated return."""
    words = game.legal_actions
    candidates = [MixPlayer({word: 1 / len(words) for word in words})]
    for one, other in itertools.combinations_with_replacement(words, 2):
        candidates.append(MixPlayer({one: 1.0} if one == other else {one: 0.5, other: 0.5}))
    chosen = [seeds[i] for i in rng.permutation(len(seeds))[:_CANDIDATE_EPISODES]]
    scores = [simulate(game, player, chosen, rng, episodes=_CANDIDATE_EPISODES).return_mean for player in candidates]
    return candidates[int(np.argmax(scores))]
