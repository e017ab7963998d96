"""DASH's gradient filtering: samples with a small advantage are dropped (Huang et al. 2025, arXiv 2505.17218).

What differs from the paper: it drops samples from the batch; here K episodes are drawn whatever is dropped, so that
samplers can be compared [D]. Its other half, preemptive sampling, is how a rollout works here anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from msgrpo_lab.sampler.base import check_num_episodes, check_pool
from msgrpo_lab.sampler.strata import select_tiers
from msgrpo_lab.types import Credit, Selection


@dataclass(frozen=True, kw_only=True)
class Dash:
    """Uniform over the episodes with |Â| ≥ threshold; where they are fewer than K, the rest is filled from the others.

    The threshold is in the unit of the episode advantage: group stds under MS-GRPO's credit.
    """

    num_episodes: int
    """K, episodes drawn from a rollout."""
    threshold: float = 0.1
    """Episodes whose |Â| is below this are dropped, > 0 [D]; the paper's abstract gives the rule and no number."""
    replace: bool = False
    """Draw with replacement; then nothing that was dropped is drawn, unless all was [D]."""
    importance_weights: bool = False
    """Undo the filter in the loss by 1/inclusion, for the episodes that can be drawn at all [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_num_episodes(self.num_episodes)
        if not 0.0 < self.threshold < float("inf"):
            raise ValueError(f"sampler.threshold={self.threshold}: must be positive and finite; 0.1 drops little")

    def __call__(
        self, credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, rng: np.random.Generator
    ) -> Selection:
        """Draws `num_episodes` of the pool, those of large |episode advantage| first."""
        adv_E = check_pool(credit, group_index, num_episodes, replace=self.replace)
        return select_tiers(
            (np.abs(adv_E) < self.threshold).astype(np.int64),
            num_episodes,
            rng,
            replace=self.replace,
            importance_weights=self.importance_weights,
        )
