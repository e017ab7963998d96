"""Held-out episodes: one an environment seed that training never draws, the same for every policy, and their scores.

The i-th episode has the same initial state, the same stream of chance events and the same stream of the policy's own
draws whoever plays it (common random numbers), so policies can be compared episode by episode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from msgrpo_lab.engines.base import RolloutEngine
from msgrpo_lab.oracle.players import Score, baseline_names, reference_scores
from msgrpo_lab.rollout.collect import Collector
from msgrpo_lab.seeding import episode_generators, generator, held_out_seeds
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.types import RolloutBatch, Sampling

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution: half-width of a 95 % interval in standard errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What became of each of E episodes."""

    returns: Float[np.ndarray, " E"]
    """The game's own return: neither shaped nor penalised."""
    success: Bool[np.ndarray, " E"]
    turns: Int[np.ndarray, " E"]
    valid_turns: Int[np.ndarray, " E"]
    """Turns whose answer named a legal action."""

    @classmethod
    def of(cls, rollout: RolloutBatch) -> Outcomes:
        """Of the episodes of a rollout, in their order."""
        return cls(
            returns=np.array([episode.game_ret for episode in rollout.episodes]),
            success=np.array([episode.success for episode in rollout.episodes]),
            turns=rollout.num_turns,
            valid_turns=np.array(
                [sum(turn.parsed.action is not None for turn in episode.turns) for episode in rollout.episodes]
            ),
        )

    def scores(self, ends: tuple[float, float] | None) -> dict[str, float]:
        """Scores with 95 % intervals over the episodes: Wilson's where every return is 1 for success or 0, since the
        normal one has no width where all episodes end alike.

        `normalised_score` is (return − low) / (high − low), with `ends` = (low, high) the returns of the lower and the
        upper reference player: 0 is the one, 1 the other. It is left out where they are not known, or the same.
        """
        share = (float(self.success.mean()), *wilson_interval(int(self.success.sum()), len(self.success)))
        binary = np.array_equal(self.returns, self.success)
        mean = share if binary else (float(self.returns.mean()), *mean_interval(self.returns))
        intervals = {"return_mean": mean, "success_rate": share}
        if ends is not None and not math.isclose(*ends):
            low, high = ends
            low_to_high = [(value - low) / (high - low) for value in intervals["return_mean"]]
            intervals["normalised_score"] = (low_to_high[0], low_to_high[1], low_to_high[2])
        named = {
            name + suffix: value
            for name, values in intervals.items()
            for suffix, value in zip(("", "_low", "_high"), values, strict=True)
        }
        rates = {
            "episode_length": float(self.turns.mean()),
            "valid_action_rate": float(self.valid_turns.sum() / self.turns.sum()),
        }
        return named | rates


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); stays inside [0, 1], holds the share, and is honest at 0 and 1."""
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # Rounding leaves 0 or 1 by some 1e-17 where it should be met.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def mean_interval(values: Sequence[float] | Float[np.ndarray, " E"]) -> tuple[float, float]:
    """95 % interval of a mean by the normal approximation; (nan, nan) for a single value."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = Z95 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def play_held_out(
    collector: Collector, engine: RolloutEngine, sampling: Sampling, episodes: int, seeds: Sequence[int] | None = None
) -> RolloutBatch:
    """The first so many held-out episodes (or as many on `seeds`), played by what the engine was last synced with."""
    return collector.collect(
        seeds=held_out_seeds(episodes) if seeds is None else seeds,
        group_size=1,
        members=[0] * episodes,
        engine=engine,
        sampling=sampling,
        rngs=episode_generators(0, "evaluation", 0, episodes),
    )


def held_out_references(make_game: Callable[[], TextGame], episodes: int, simulations: int) -> dict[str, Score]:
    """Scores of the reference players by name (see `reference_scores`).

    Exact on the very episodes' initial states for Frozen Lake; simulated on these and further held-out seeds, at least
    `simulations` in all, for other games.
    """
    exact = isinstance(make_game(), FrozenLake)
    seeds = held_out_seeds(episodes if exact else max(episodes, simulations))
    return reference_scores(make_game, seeds, generator(0, "reference"))


def reference_ends(game: TextGame, references: Mapping[str, Score]) -> tuple[float, float] | None:
    """Returns of the lower and the upper reference player; None for a game without an upper one."""
    try:
        low, high = baseline_names(game)
    except ValueError:
        return None
    return references[low].return_mean, references[high].return_mean
