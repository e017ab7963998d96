"""Episode sampling by the rank of |Â|: keeps the order of absolute-advantage sampling and bounds its skew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from msgrpo_lab.sampler.base import check_num_episodes, check_pool, select
from msgrpo_lab.types import Credit, Selection


@dataclass(frozen=True, kw_only=True)
class RankAdvantage:
    """p_i ∝ number of episodes whose |Â| is at most |Â_i|; ties share a rank, an all-equal pool is uniform."""

    num_episodes: int
    """K, episodes drawn from a rollout."""
    replace: bool = False
    """Draw with replacement."""
    importance_weights: bool = False
    """Undo the weighting in the loss by 1/inclusion."""

    def __post_init__(self) -> None:
        """Raises ValueError on a number of episodes below 1."""
        check_num_episodes(self.num_episodes)

    def __call__(
        self, credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, rng: np.random.Generator
    ) -> Selection:
        """Draws `num_episodes` of the pool by rank."""
        size_E = np.abs(check_pool(credit, group_index, num_episodes, replace=self.replace))
        rank_E = np.searchsorted(np.sort(size_E), size_E, side="right")
        return select(
            rank_E / rank_E.sum(),
            num_episodes,
            rng,
            replace=self.replace,
            importance_weights=self.importance_weights,
        )
