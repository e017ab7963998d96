"""Reward-to-go: a turn is credited with what came after it, relative to the group.

Which baseline? Both of these are in use, so the choice is an argument:

- `group` (default): one mean and one spread over all turns of all episodes of the group, as GRPO with process
  supervision takes them (DeepSeekMath, arXiv 2402.03300, section 4.1.3; there on step rewards before summing, here on
  the sums). With one reward at the end, γ = 1 and `episode` weighting the rule is then MS-GRPO exactly.
- `turn`: mean and spread over the group's episodes that still play at the same turn, the time-dependent baseline of the
  policy-gradient literature (Williams 1992; Greensmith et al. 2004). It takes out what early turns earn more than late
  ones merely for being early, but late turns are compared with few survivors, and a lone survivor gets 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from msgrpo_lab.credit.base import centre_by_group, check_normaliser, rewards_of
from msgrpo_lab.credit.episode_return import episode_advantage
from msgrpo_lab.types import Credit, RolloutBatch


def reward_to_go(reward_ET: Float[np.ndarray, "E T"], gamma: float) -> Float[np.ndarray, "E T"]:
    """Discounted sum of the rewards from each turn on: G_{i,t} = Σ_{s≥t} γ^{s−t} r_{i,s}.

    `reward_ET` holds 0 past an episode's end, and so does the result.
    """
    if reward_ET.ndim != 2:
        raise ValueError(f"reward_ET has shape {reward_ET.shape}: must be [E, T]")
    return_ET = reward_ET.astype(np.float64, copy=True)
    for t in range(reward_ET.shape[1] - 2, -1, -1):
        return_ET[:, t] += gamma * return_ET[:, t + 1]
    return return_ET


@dataclass(frozen=True, kw_only=True)
class RewardToGo:
    """Credit by turn return: A_{i,t} = (G_{i,t} − baseline) / (spread + δ), G_{i,t} = Σ_{s≥t} γ^{s−t} r_{i,s}.

    `episode_adv`, which samplers weight by, is MS-GRPO's Â_i whatever the arguments here (γ does not enter), so that a
    comparison of credit rules draws episodes by one rule.
    """

    gamma: float = 1.0
    """Discount a turn, in [0, 1] [D]; 1 agrees with the undiscounted episode return."""
    normalise: Literal["std", "batch", "none"] = "std"
    """Divide by the std of the values the baseline is the mean of, by that of the whole batch, or by nothing [D]."""
    baseline: Literal["group", "turn"] = "group"
    """Mean over all turns of the group, or over the group's turns with the same index [D]."""
    baseline_weighting: Literal["step", "episode"] = "episode"
    """What the group's and the batch's statistics count alike: every turn, or every episode (a turn of a T-turn episode
    then weighs 1/T) [D]. The `turn` baseline counts every episode that still plays once either way."""
    delta: float = 1e-6
    """Added to the std [D]."""
    min_std: float = 0.0
    """Floor of the std, as in `EpisodeReturn` [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_normaliser(self.normalise, ("std", "batch", "none"), self.delta, self.min_std)
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"credit.gamma={self.gamma} must lie in [0, 1]: 1 is the undiscounted return")
        if self.baseline not in ("group", "turn"):
            raise ValueError(f"credit.baseline={self.baseline!r} is unknown: use one of group, turn")
        if self.baseline_weighting not in ("step", "episode"):
            raise ValueError(
                f"credit.baseline_weighting={self.baseline_weighting!r} is unknown: use one of step, episode"
            )

    @property
    def invariances(self) -> frozenset[str]:
        """Depends on the arguments: a batch spread couples groups, and only undiscounted sums shift alike."""
        names = {"episode_permutation", "group_relabel"}
        if self.normalise != "batch":
            names.add("group_independence")
        if self.gamma == 1.0:
            names.add("return_shift")
        if self.normalise != "none" and self.min_std == 0.0:
            names.add("reward_scale")
        return frozenset(names)

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages `[E, T]` from turn returns; `episode_adv` is MS-GRPO's."""
        rewards = rewards_of(batch)
        mask_ET = rewards.mask
        num_episodes, num_turns = mask_ET.shape
        _, group_E = np.unique(batch.group_index, return_inverse=True)
        turn_ET = np.broadcast_to(np.arange(num_turns), mask_ET.shape)
        group_ET = np.broadcast_to(group_E[:, None], mask_ET.shape)
        if self.baseline == "turn":
            group_ET = group_ET * num_turns + turn_ET
        weight_E = 1.0 / mask_ET.sum(axis=1) if self.baseline_weighting == "episode" else np.ones(num_episodes)
        weight_N = np.broadcast_to(weight_E[:, None], mask_ET.shape)[mask_ET]

        centred_N, std_N = centre_by_group(
            reward_to_go(rewards.reward, self.gamma)[mask_ET],
            group_ET[mask_ET],
            magnitude_N=reward_to_go(np.abs(rewards.reward), self.gamma)[mask_ET],
            weight_N=weight_N if self.baseline == "group" else None,
        )
        if self.normalise == "batch":
            std_N = np.sqrt(np.average(centred_N**2, weights=weight_N))
        scale_N = 1.0 if self.normalise == "none" else np.maximum(std_N, self.min_std) + self.delta
        adv_ET = np.zeros(mask_ET.shape)
        adv_ET[mask_ET] = centred_N / scale_N
        return Credit(
            turn_adv=adv_ET,
            turn_mask=mask_ET,
            episode_adv=episode_advantage(rewards, batch.group_index, delta=self.delta, min_std=self.min_std),
        )
