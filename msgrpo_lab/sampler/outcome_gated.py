"""Draws gated by outcome: a fixed share of the training episodes are successes [D].

No public source gives this rule. What it rests on: with a success-or-failure reward, the signal is strongest where half
of the episodes succeed (arXiv 2504.03380; 2605.05112), and a pool seldom offers half of each by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from msgrpo_lab.sampler.base import check_num_episodes, check_pool, select, success_of
from msgrpo_lab.sampler.strata import select_strata
from msgrpo_lab.types import Credit, Selection


@dataclass(frozen=True, kw_only=True)
class OutcomeGated:
    """K · `success_share` successes and the rest failures, each drawn uniformly among its like.

    A number that is not whole is rounded down or up at random, so the inclusion probabilities are exact. Where one
    outcome is too rare, all its episodes are drawn and the rest is filled from the other.
    """

    num_episodes: int
    """K, episodes drawn from a rollout."""
    success_share: float = 0.5
    """Share of the drawn episodes that are successes, in [0, 1] [D]."""
    replace: bool = False
    """Draw with replacement: `success_share` is then the probability of a draw, if there are both outcomes [D]."""
    importance_weights: bool = False
    """Undo the gate in the loss by 1/inclusion, for the episodes that can be drawn at all [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_num_episodes(self.num_episodes)
        if not 0.0 <= self.success_share <= 1.0:
            raise ValueError(f"sampler.success_share={self.success_share}: must lie in [0, 1]; 0.5 balances the two")

    def __call__(
        self, credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, rng: np.random.Generator
    ) -> Selection:
        """Draws `num_episodes` of the pool by outcome."""
        check_pool(credit, group_index, num_episodes, replace=self.replace)
        success_E = success_of(credit)
        size_G = np.bincount(success_E.astype(np.int64), minlength=2)
        share_G = np.array([1.0 - self.success_share, self.success_share])
        if self.replace:
            share_G = share_G if size_G.min() > 0 else (size_G > 0).astype(np.float64)
            prob_E = (share_G / np.maximum(size_G, 1))[success_E.astype(np.int64)]
            return select(prob_E, num_episodes, rng, replace=True, importance_weights=self.importance_weights)
        successes = np.clip(num_episodes * self.success_share, num_episodes - size_G[0], size_G[1])
        return select_strata(
            success_E.astype(np.int64),
            np.array([num_episodes - successes, successes]),
            rng,
            importance_weights=self.importance_weights,
        )
