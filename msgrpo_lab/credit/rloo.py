"""RLOO: the episode's return above the mean return of the *other* episodes of its group.

Leaving oneself out makes the baseline independent of one's own return, so that the policy gradient stays unbiased.
Source: Kool et al. 2019 ("Buy 4 REINFORCE samples, get a baseline for free"); for language models arXiv 2402.14740.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.credit.base import (
    ALWAYS,
    Rewards,
    Weighting,
    check_normaliser,
    check_weighting,
    episode_weights,
    rewards_of,
)
from msgrpo_lab.credit.episode_return import episode_advantage, spread_over_turns
from msgrpo_lab.types import Credit, RolloutBatch


def leave_one_out(
    rewards: Rewards, group_index_E: Int[np.ndarray, " E"], weight_E: Float[np.ndarray, " E"] | None = None
) -> Float[np.ndarray, " E"]:
    """R_i − Σ_{j≠i} w_j R_j / Σ_{j≠i} w_j over the group of each episode; 0 for an episode alone in its group.

    Computed as (R_i − mean_g R) · W_g / (W_g − w_i), with W_g the group's total weight: with equal weights, G/(G − 1)
    times the deviation from the mean of all G. `weight_E` None is equal weights.
    """
    deviation_E = episode_advantage(rewards, group_index_E, normalise="none", weight_E=weight_E)
    _, group_E, size_G = np.unique(group_index_E, return_inverse=True, return_counts=True)
    weight_E = np.ones(group_E.size) if weight_E is None else weight_E
    total_E = np.bincount(group_E, weight_E)[group_E]
    accompanied_E = size_G[group_E] > 1
    factor_E = np.divide(total_E, total_E - weight_E, out=np.zeros(group_E.size), where=accompanied_E)
    return deviation_E * factor_E


@dataclass(frozen=True, kw_only=True)
class RLOO:
    """Credit by leave-one-out return: A_{i,t} = R_i − mean_{j ≠ i} R_j for every turn t of episode i, in reward units.

    An episode alone in its group has nothing to be compared with and gets 0 [D], as under every other group rule.
    `episode_adv`, which samplers weight by, is MS-GRPO's Â_i, as in every rule but `EpisodeReturn`.
    """

    baseline_weighting: Weighting = "episode"
    """What the mean over the others counts alike; the paper's mean is over samples."""
    delta: float = 1e-6
    """Added to the std of `episode_adv` [D]; plays no part in the credit."""
    min_std: float = 0.0
    """Floor of the std of `episode_adv`, as in `EpisodeReturn` [D]; plays no part in the credit."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_normaliser("none", ("none",), self.delta, self.min_std)
        check_weighting(self.baseline_weighting)

    @property
    def invariances(self) -> frozenset[str]:
        """All but scale: the credit is in reward units."""
        return ALWAYS | {"group_independence", "return_shift", "state_blind"}

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages `[E, T]`, the same on every turn of an episode."""
        rewards = rewards_of(batch)
        adv_E = leave_one_out(rewards, batch.group_index, episode_weights(batch, self.baseline_weighting))
        return Credit(
            turn_adv=spread_over_turns(adv_E, rewards.mask),
            turn_mask=rewards.mask,
            episode_adv=episode_advantage(rewards, batch.group_index, delta=self.delta, min_std=self.min_std),
        )
