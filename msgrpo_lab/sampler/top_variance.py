"""RAGEN's group filter: train on the groups whose returns differ most (StarPO-S, arXiv 2504.20073)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.sampler.base import check_num_episodes, check_pool, group_spread, returns_of
from msgrpo_lab.sampler.strata import select_tiers
from msgrpo_lab.types import Credit, Selection


def spread_tiers(
    spread_E: Float[np.ndarray, " E"], group_index: Int[np.ndarray, " E"], keep: float
) -> Int[np.ndarray, " E"]:
    """Tier 0 for the kept groups, then one tier for each further spread, in descending order.

    Kept are the groups of largest spread, at most a share `keep` of them (rounded up), and never some of several groups
    of the same spread: these are kept together, or make the next tier together. The first class is always kept.
    """
    _, first_G = np.unique(group_index, return_index=True)
    value_C, class_G = np.unique(-spread_E[first_G], return_inverse=True)
    above_C = np.cumsum(np.bincount(class_G))
    kept_C = above_C <= np.ceil(keep * first_G.size - 1e-9)
    tier_C = np.where(kept_C, 0, np.arange(value_C.size))  # the first class is tier 0 either way
    return tier_C[np.searchsorted(value_C, -spread_E)]


@dataclass(frozen=True, kw_only=True)
class TopVariance:
    """Uniform over the episodes of the groups with the largest std of returns.

    Where these hold fewer than K episodes, the rest is filled from the groups of the next largest std, and so on. The
    std is of the returns themselves, which a normalised advantage no longer shows.
    """

    num_episodes: int
    """K, episodes drawn from a rollout."""
    keep: float = 0.25
    """Share of the groups kept, in (0, 1]; 0.25 as in the base configuration of the authors' code (RAGEN)."""
    replace: bool = False
    """Draw with replacement; then the kept groups alone are drawn from [D]."""
    importance_weights: bool = False
    """Undo the filter in the loss by 1/inclusion, for the episodes that can be drawn at all [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_num_episodes(self.num_episodes)
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"sampler.keep={self.keep}: must lie in (0, 1]; 0.25 keeps a quarter of the groups")

    def __call__(
        self, credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, rng: np.random.Generator
    ) -> Selection:
        """Draws `num_episodes` of the pool, those of groups with a large spread first."""
        check_pool(credit, group_index, num_episodes, replace=self.replace)
        return select_tiers(
            spread_tiers(group_spread(returns_of(credit), group_index), group_index, self.keep),
            num_episodes,
            rng,
            replace=self.replace,
            importance_weights=self.importance_weights,
        )
