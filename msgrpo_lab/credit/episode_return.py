"""MS-GRPO: the advantage of the whole episode goes to each of its turns (paper section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from msgrpo_lab.credit.base import (
    ALWAYS,
    Normalise,
    Rewards,
    Turns,
    Weighting,
    check_normaliser,
    check_weighting,
    episode_weights,
    matrix_of,
    relative_to_group,
    rewards_of,
)
from msgrpo_lab.types import Credit, RolloutBatch


def episode_advantage(
    rewards: Rewards,
    group_index_E: Int[np.ndarray, " E"],
    *,
    normalise: Normalise = "std",
    delta: float = 1e-6,
    min_std: float = 0.0,
    weight_E: Float[np.ndarray, " E"] | None = None,
) -> Float[np.ndarray, " E"]:
    """Advantage of each episode relative to its group: Â_i = (R_i − mean_g R) / (max(std_g R, min_std) + δ).

    R_i = Σ_t r_{i,t}, undiscounted; population std; an all-equal group gives exactly 0. With `normalise="none"` the
    deviation itself, in the unit of the reward. `weight_E` is how much an episode counts in mean and std, None for
    equal weights. Source: paper section 3, MS-GRPO.
    """
    return relative_to_group(
        rewards.reward.sum(axis=1),
        group_index_E,
        magnitude_N=np.abs(rewards.reward).sum(axis=1),
        weight_N=weight_E,
        normalise=normalise,
        delta=delta,
        min_std=min_std,
    )


def spread_over_turns(adv_E: Float[np.ndarray, " E"], mask_ET: Bool[np.ndarray, "E T"]) -> Float[np.ndarray, "E T"]:
    """An episode's advantage on each of its turns, 0 past its end."""
    return np.where(mask_ET, adv_E[:, None], 0.0)


def turn_credit(
    adv_N: Float[np.ndarray, " N"], turns: Turns, batch: RolloutBatch, *, delta: float, min_std: float
) -> Credit:
    """Credit of a rule that gives every turn its own advantage, one for each played turn.

    `episode_adv`, which samplers weight by, is MS-GRPO's Â_i whatever the rule, so that a comparison of credit rules
    draws episodes by one rule.
    """
    return Credit(
        turn_adv=matrix_of(adv_N, turns.mask),
        turn_mask=turns.mask,
        episode_adv=episode_advantage(turns.rewards, batch.group_index, delta=delta, min_std=min_std),
    )


@dataclass(frozen=True, kw_only=True)
class EpisodeReturn:
    """Credit by whole-episode return: A_{i,t} = Â_i for every turn t of episode i (paper section 3, MS-GRPO)."""

    normalise: Normalise = "std"
    """Divide by the group's population std, or give the deviation in the unit of the reward."""
    baseline_weighting: Weighting = "episode"
    """What the group's mean and std count alike [D: the paper's text is not public]; `step` is what a mean over batch
    rows does."""
    delta: float = 1e-6
    """Added to the std [D]."""
    min_std: float = 0.0
    """Floor of the std: a group with less spread is not blown up to unit spread [D]; 0 is the paper's rule."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_normaliser(self.normalise, ("std", "none"), self.delta, self.min_std)
        check_weighting(self.baseline_weighting)

    @property
    def invariances(self) -> frozenset[str]:
        """All of them; scale only where the spread is divided out and has no floor in reward units."""
        scale = {"reward_scale"} if self.normalise == "std" and self.min_std == 0.0 else set()
        return ALWAYS | {"group_independence", "return_shift", "state_blind"} | scale

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages `[E, T]`, the same on every turn of an episode, and the same number as `episode_adv`."""
        rewards = rewards_of(batch)
        adv_E = episode_advantage(
            rewards,
            batch.group_index,
            normalise=self.normalise,
            delta=self.delta,
            min_std=self.min_std,
            weight_E=episode_weights(batch, self.baseline_weighting),
        )
        return Credit(turn_adv=spread_over_turns(adv_E, rewards.mask), turn_mask=rewards.mask, episode_adv=adv_E)
