"""MS-GRPO: the advantage of the whole episode goes to each of its turns (paper section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.credit.base import Rewards, centre_by_group, check_normaliser, rewards_of
from msgrpo_lab.types import Credit, RolloutBatch


def episode_advantage(
    rewards: Rewards,
    group_index_E: Int[np.ndarray, " E"],
    *,
    normalise: Literal["std", "none"] = "std",
    delta: float = 1e-6,
    min_std: float = 0.0,
) -> Float[np.ndarray, " E"]:
    """Advantage of each episode relative to its group: Â_i = (R_i − mean_g R) / (max(std_g R, min_std) + δ).

    R_i = Σ_t r_{i,t}, undiscounted; population std; an all-equal group gives exactly 0. With `normalise="none"` the
    deviation itself, in the unit of the reward. Source: paper section 3, MS-GRPO.
    """
    return_E = rewards.reward.sum(axis=1)
    magnitude_E = np.abs(rewards.reward).sum(axis=1)
    centred_E, std_E = centre_by_group(return_E, group_index_E, magnitude_N=magnitude_E)
    if normalise == "none":
        return centred_E
    advantage_E: Float[np.ndarray, " E"] = centred_E / (np.maximum(std_E, min_std) + delta)
    return advantage_E


@dataclass(frozen=True, kw_only=True)
class EpisodeReturn:
    """Credit by whole-episode return: A_{i,t} = Â_i for every turn t of episode i (paper section 3, MS-GRPO)."""

    normalise: Literal["std", "none"] = "std"
    """Divide by the group's population std, or give the deviation in the unit of the reward."""
    delta: float = 1e-6
    """Added to the std [D]."""
    min_std: float = 0.0
    """Floor of the std: a group with less spread is not blown up to unit spread [D]; 0 is the paper's rule."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_normaliser(self.normalise, ("std", "none"), self.delta, self.min_std)

    @property
    def invariances(self) -> frozenset[str]:
        """All of them; scale only where the spread is divided out and has no floor in reward units."""
        always = {"episode_permutation", "group_relabel", "group_independence", "return_shift"}
        return frozenset(always | ({"reward_scale"} if self.normalise == "std" and self.min_std == 0.0 else set()))

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages `[E, T]`, the same on every turn of an episode, and the same number as `episode_adv`."""
        rewards = rewards_of(batch)
        adv_E = episode_advantage(
            rewards, batch.group_index, normalise=self.normalise, delta=self.delta, min_std=self.min_std
        )
        return Credit(turn_adv=np.where(rewards.mask, adv_E[:, None], 0.0), turn_mask=rewards.mask, episode_adv=adv_E)
