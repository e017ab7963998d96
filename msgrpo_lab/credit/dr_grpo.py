"""Dr. GRPO credit: the episode's return above its group's mean, not divided by the group's spread.

Dividing by the std weighs groups by how little their returns differ: a group that nearly always succeeds or fails
counts as much as one that is in the balance. Dr. GRPO ("Understanding R1-Zero-like training", arXiv 2503.20783,
section 3) takes the division out, and the division by completion length with it: that second half is
`loss.reduction=dr_grpo`.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgrpo_lab.credit.base import ALWAYS, Weighting, check_normaliser, check_weighting, episode_weights, rewards_of
from msgrpo_lab.credit.episode_return import episode_advantage, spread_over_turns
from msgrpo_lab.types import Credit, RolloutBatch


@dataclass(frozen=True, kw_only=True)
class DrGRPO:
    """Credit by deviation of the return: A_{i,t} = R_i − mean_g R for every turn t of episode i, in reward units.

    `episode_adv`, which samplers weight by, is MS-GRPO's Â_i, as in every rule but `EpisodeReturn`.
    """

    baseline_weighting: Weighting = "episode"
    """What the group's mean counts alike; the paper's mean is over the group's samples."""
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
        adv_E = episode_advantage(
            rewards,
            batch.group_index,
            normalise="none",
            weight_E=episode_weights(batch, self.baseline_weighting),
        )
        return Credit(
            turn_adv=spread_over_turns(adv_E, rewards.mask),
            turn_mask=rewards.mask,
            episode_adv=episode_advantage(rewards, batch.group_index, delta=self.delta, min_std=self.min_std),
        )
