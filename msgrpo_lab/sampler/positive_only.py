"""Only what went better than its group: RAFT, rejection sampling (Dong et al. 2023, arXiv 2304.06767; 2504.11343)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from msgrpo_lab.sampler.base import check_num_episodes, check_pool
from msgrpo_lab.sampler.strata import select_tiers
from msgrpo_lab.types import Credit, Selection


@dataclass(frozen=True, kw_only=True)
class PositiveOnly:
    """Uniform over the episodes with Â > 0.

    Without replacement, where these are fewer than K, all of them are drawn and the rest is filled from the episodes
    with Â = 0, which no policy gradient comes from, and only then from those with Â < 0. With replacement episodes with
    Â > 0 are drawn more than once instead, and nothing else is unless there is none.
    What differs from RAFT: the loss still weighs by Â, where RAFT imitates all accepted samples alike.
    """

    num_episodes: int
    """K, episodes drawn from a rollout."""
    replace: bool = False
    """Draw with replacement [D]."""
    importance_weights: bool = False
    """Undo the choice in the loss by 1/inclusion, for the episodes that can be drawn at all [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on a number of episodes below 1."""
        check_num_episodes(self.num_episodes)

    def __call__(
        self, credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, rng: np.random.Generator
    ) -> Selection:
        """Draws `num_episodes` of the pool, those with a positive episode advantage first."""
        adv_E = check_pool(credit, group_index, num_episodes, replace=self.replace)
        return select_tiers(
            -np.sign(adv_E).astype(np.int64),
            num_episodes,
            rng,
            replace=self.replace,
            importance_weights=self.importance_weights,
        )
