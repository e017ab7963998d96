"""Uniform episode sampling: the control that absolute-advantage weighting is compared with (paper section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from msgrpo_lab.sampler.base import check_num_episodes, check_pool, select
from msgrpo_lab.types import Credit, Selection


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every episode of the pool with the same probability, p_i = 1/E (paper section 4)."""

    num_episodes: int
    """K, episodes drawn from a rollout."""
    replace: bool = False
    """Draw with replacement."""
    importance_weights: bool = False
    """Kept so that samplers can be swapped; the weight of a uniform draw is 1 either way."""

    def __post_init__(self) -> None:
        """Raises ValueError on a number of episodes below 1."""
        check_num_episodes(self.num_episodes)

    def __call__(
        self, credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, rng: np.random.Generator
    ) -> Selection:
        """Draws `num_episodes` of the pool; advantages play no part."""
        pool = check_pool(credit, group_index, num_episodes, replace=self.replace).size
        return select(
            np.full(pool, 1.0 / pool),
            num_episodes,
            rng,
            replace=self.replace,
            importance_weights=self.importance_weights,
        )
