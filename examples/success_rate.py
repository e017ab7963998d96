"""Success credit: an episode is compared with its group by success alone, whatever the rewards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from msgrpo_lab.credit.base import ALWAYS, centre_by_group, turns_of
from msgrpo_lab.credit.episode_return import turn_credit
from msgrpo_lab.types import Credit, RolloutBatch


@dataclass(frozen=True, kw_only=True)
class SuccessRate:
    """A_{i,t} = success_i − success rate of the group, for every turn t of episode i; between −1 and 1."""

    @property
    def invariances(self) -> frozenset[str]:
        """All of them: rewards and states play no part."""
        return ALWAYS | {"group_independence", "return_shift", "reward_scale", "state_blind"}

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages `[E, T]`, the same on every turn of an episode; `episode_adv` is MS-GRPO's."""
        turns = turns_of(batch)
        success_E = np.array([float(episode.success) for episode in batch.episodes])
        adv_E = centre_by_group(success_E, batch.group_index, magnitude_N=np.ones_like(success_E)).deviation
        return turn_credit(adv_E[turns.episode], turns, batch, delta=1e-6, min_std=0.0)
