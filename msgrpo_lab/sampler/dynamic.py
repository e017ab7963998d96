"""DAPO's dynamic sampling: groups without spread are dropped, the batch is refilled (arXiv 2503.14476, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from msgrpo_lab.sampler.base import check_num_episodes, check_pool, group_spread, returns_of
from msgrpo_lab.sampler.strata import select_tiers
from msgrpo_lab.types import Credit, Selection


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Uniform over the episodes of groups whose returns differ.

    Where these are fewer than K, up to `max_refills` further rollouts are collected (see `refill.Refilling`). What is
    still lacking is filled from the groups without spread, which no policy gradient comes from.
    """

    num_episodes: int
    """K, episodes drawn from a rollout."""
    max_refills: int = 0
    """Further rollouts an epoch at most; 0 is none [D]. DAPO goes on until the batch is full."""
    replace: bool = False
    """Draw with replacement; then groups without spread are never drawn, unless there is no other [D]."""
    importance_weights: bool = False
    """Undo the filter in the loss by 1/inclusion, for the episodes that can be drawn at all [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_num_episodes(self.num_episodes)
        if self.max_refills < 0:
            raise ValueError(f"sampler.max_refills={self.max_refills}: must be at least 0; 0 never collects more")

    def __call__(
        self, credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, rng: np.random.Generator
    ) -> Selection:
        """Draws `num_episodes` of the pool, those of groups with spread first."""
        check_pool(credit, group_index, num_episodes, replace=self.replace)
        return select_tiers(
            (~_differs(credit, group_index)).astype(np.int64),
            num_episodes,
            rng,
            replace=self.replace,
            importance_weights=self.importance_weights,
        )

    def episodes_wanted(
        self, credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, refills: int
    ) -> int:
        """As many as are expected to bring what K lacks, at the share of groups with spread that was seen so far."""
        differs_E = _differs(credit, group_index)
        lacking = num_episodes - int(differs_E.sum())
        if refills >= self.max_refills or lacking <= 0:
            return 0
        return math.ceil(lacking / max(float(differs_E.mean()), 1.0 / differs_E.size))


def _differs(credit: Credit, group_index: Int[np.ndarray, " E"]) -> Bool[np.ndarray, " E"]:
    """Whether the returns of each episode's group differ."""
    return group_spread(returns_of(credit), group_index) > 0.0
