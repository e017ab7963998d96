"""How hard a scenario is: what the best known player and a random one reach on each of its initial states.

Frozen Lake: exact probabilities of reaching the goal within the horizon. Other games: simulated, and no optimum is
claimed; Snake's upper player is a search, named as such (`baseline_names`). The initial states are the held-out ones of
evaluation, the same for every run, so that a learner's scores can be read against these numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from msgrpo_lab.oracle.frozen_lake import optimal_success, random_success
from msgrpo_lab.oracle.players import Player, RandomPlayer, Score, SearchPlayer, simulate
from msgrpo_lab.seeding import held_out_seeds
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.snake import Snake
from msgrpo_lab.tsmg.snake_rules import paper_state

SCHEMA = "msgrpo_lab.oracle/1"
"""Names the layout of `Difficulty.as_json`; another layout gets another number."""
RESAMPLES = 10_000
"""Bootstrap resamples of the maps for an interval."""


class Mean(NamedTuple):
    """A mean over maps with its 95 % interval over maps; (nan, nan) with a single map."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MapScores:
    """One initial state and how players do from it."""

    seed: int
    rows: tuple[str, ...]
    """The map's rows of letters, one a cell."""
    players: Mapping[str, Score]
    """By name; `random` is always there, `optimal` where the optimum is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    """How hard a scenario is."""

    game: TextGame
    maps: tuple[MapScores, ...]
    means: Mapping[str, Mapping[str, Mean]]
    """By player, of `success` and `return`: means over the maps."""

    @property
    def exact(self) -> bool:
        """Whether every score was computed instead of simulated."""
        return all(score.exact for one in self.maps for score in one.players.values())

    def as_json(self, *, env: str, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Plain values for a JSON file. Probabilities that are not known, and intervals of one map, are null.

        Args:
            env: name of the scenario.
            settings: its configuration.
            seed: of simulations and intervals.
        """
        return {
            "schema": SCHEMA,
            "env": env,
            "game": type(self.game).__name__,
            "settings": dict(settings),
            "horizon": self.game.horizon,
            "seed": seed,
            "exact": self.exact,
            "num_maps": len(self.maps),
            "mean": {
                player: {
                    quantity: {name: None if np.isnan(value) else value for name, value in mean._asdict().items()}
                    for quantity, mean in quantities.items()
                }
                for player, quantities in self.means.items()
            },
            "maps": [
                {
                    "seed": one.seed,
                    "map": list(one.rows),
                    **{player: one.players[player].success_rate for player in one.players},
                    **({} if "optimal" in one.players else {"optimal": None}),
                    "scores": {player: asdict(score) for player, score in one.players.items()},
                }
                for one in self.maps
            ],
        }


def difficulty(
    make_game: Callable[[], TextGame], num_maps: int, rng: np.random.Generator, *, episodes_per_map: int = 20
) -> Difficulty:
    """Scores of `optimal` (Frozen Lake), `search` (Snake) and `random` on the first held-out initial states.

    Args:
        make_game: makes a game of the scenario.
        num_maps: initial states, at least 1.
        rng: all chance, of simulated players and of the intervals.
        episodes_per_map: episodes of each simulated player on each initial state, at least 2; without effect on
            Frozen Lake.

    Raises:
        ValueError: a number is out of range.
    """
    for key, value, least in (("num_maps", num_maps, 1), ("episodes_per_map", episodes_per_map, 2)):
        if value < least:
            raise ValueError(f"{key}={value}: must be at least {least}")
    game = make_game()
    interval_rng, *player_rngs = rng.spawn(3)
    players = _simulated_players(game)
    maps = []
    for seed in held_out_seeds(num_maps):
        game.reset(seed=seed)
        rows = map_rows(game)
        if isinstance(game, FrozenLake):
            scores = {"optimal": _exact(optimal_success(game)), "random": _exact(random_success(game))}
        else:
            scores = {
                name: simulate(game, player, [seed], player_rng, episodes=episodes_per_map)
                for (name, player), player_rng in zip(players.items(), player_rngs, strict=False)
            }
        maps.append(MapScores(seed=seed, rows=rows, players=scores))
    return Difficulty(game=game, maps=tuple(maps), means=_means(maps, interval_rng))


def map_rows(game: TextGame) -> tuple[str, ...]:
    """The game's current state as rows of letters: Frozen Lake's map, Snake's drawn board, else the lines it reads as.

    Frozen Lake: S start, F ice, H hole, G goal. Snake: P and p the player's head and body, S and s others', A apple,
    B banana, . free.
    """
    if isinstance(game, FrozenLake):
        return game.lake.rows
    if isinstance(game, Snake):
        _, _, drawn = paper_state(game.board).partition("Grid:\n")
        return tuple(line.replace(" ", "") for line in drawn.splitlines()[: game.size])
    return tuple(game.render_text().splitlines())


def bootstrap_mean(values_N: Float[np.ndarray, " N"], rng: np.random.Generator) -> Mean:
    """Mean of independent values and its 95 % percentile interval from resampling them (Efron 1979).

    It cannot leave the values' range, as a normal approximation would for probabilities near 0 or 1.
    """
    mean = float(values_N.mean())
    if len(values_N) < 2:
        return Mean(mean, float("nan"), float("nan"))
    drawn = values_N[rng.integers(len(values_N), size=(RESAMPLES, len(values_N)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Mean(mean, float(low), float(high))


def _simulated_players(game: TextGame) -> dict[str, Player]:
    return (
        {"search": SearchPlayer(), "random": RandomPlayer()} if isinstance(game, Snake) else {"random": RandomPlayer()}
    )


def _exact(success: float) -> Score:
    return Score(return_mean=success, success_rate=success, standard_error=0.0, exact=True)


def _means(maps: Sequence[MapScores], rng: np.random.Generator) -> dict[str, dict[str, Mean]]:
    return {
        player: {
            "success": bootstrap_mean(np.array([one.players[player].success_rate for one in maps]), rng),
            "return": bootstrap_mean(np.array([one.players[player].return_mean for one in maps]), rng),
        }
        for player in maps[0].players
    }
