"""What is kept of a cell, one policy on one scenario under one decoding: a number or two an episode."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.rollout.held_out import Outcomes
from msgrpo_lab.rollout.metrics import action_entropy
from msgrpo_lab.types import RolloutBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """The E episodes of a cell."""

    outcomes: Outcomes
    seeds: Int[np.ndarray, " E"]
    """Environment seeds."""
    tokens: Int[np.ndarray, " E"]
    """Completion tokens."""
    surprise: Float[np.ndarray, " E"]
    """−Σ log p of an episode's completion tokens, nats; nan where no log-probability is known, or none was drawn by."""
    action_entropy: float
    """Nats, mean over turns (`rollout.metrics.action_entropy`); nan where it is not defined."""

    @classmethod
    def of(cls, rollout: RolloutBatch, *, drawn: bool, constrained: bool) -> Played:
        """Of a rollout of one episode a group.

        Args:
            rollout: the episodes.
            drawn: whether completions were drawn from a distribution whose log-probabilities they carry. Without,
                there are no entropies: −log p of a token that was not drawn estimates nothing.
            constrained: whether a completion was one of the legal words and nothing else.
        """
        completions = [[turn.completion for turn in episode.turns] for episode in rollout.episodes]
        surprise = [-sum(float(one.logprobs.sum(dtype=np.float64)) for one in episode) for episode in completions]
        return cls(
            outcomes=Outcomes.of(rollout),
            seeds=np.array([episode.seed for episode in rollout.episodes], dtype=np.int64),
            tokens=np.array([sum(len(one.token_ids) for one in episode) for episode in completions], dtype=np.int64),
            surprise=np.array(surprise if drawn else [math.nan] * len(surprise)),
            action_entropy=action_entropy(rollout, constrained) if drawn else math.nan,
        )

    def __len__(self) -> int:
        """Episodes."""
        return len(self.seeds)

    @property
    def token_entropy(self) -> float:
        """Mean over completion tokens of −log p, nats: an unbiased estimate of the entropy of the distributions that
        they were drawn from, at the states that were visited; nan where it is not defined.
        """
        total = int(self.tokens.sum())
        return float(self.surprise.sum() / total) if total else math.nan

    def scores(self, ends: tuple[float, float] | None) -> dict[str, float]:
        """`Outcomes.scores`, and the two entropies."""
        return {
            **self.outcomes.scores(ends),
            "token_entropy": self.token_entropy,
            "action_entropy": self.action_entropy,
        }
