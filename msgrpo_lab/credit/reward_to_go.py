"""Reward-to-go: a turn is credited with what came after it, relative to a baseline.

Which baseline? All of these are in use, so the choice is an argument:

- `group` (default): one mean and one spread over all turns of all episodes of the group, as GRPO with process
  supervision takes them (DeepSeekMath, arXiv 2402.03300, section 4.1.3; there on step rewards before summing, here on
  the sums). With one reward at the end and γ = 1 the rule is then MS-GRPO of the same `baseline_weighting` exactly.
- `turn`: mean and spread over the group's episodes that still play at the same turn, the time-dependent baseline of the
  policy-gradient literature (Williams 1992; Greensmith et al. 2004). It takes out what early turns earn more than late
  ones merely for being early, but late turns are compared with few survivors, and a lone survivor gets 0.
- `batch`: one mean and one spread over all turns of the whole rollout: return batch normalisation, ReBN (GEM,
  arXiv 2510.01051). Needs no groups, and credits a turn for having been met on an easy map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.credit.base import (
    ALWAYS,
    Turns,
    Weighting,
    centre_by_group,
    check_between,
    check_choice,
    check_normaliser,
    check_weighting,
    pairs_of,
    turn_weights,
    turns_of,
)
from msgrpo_lab.credit.episode_return import turn_credit
from msgrpo_lab.types import Credit, RolloutBatch

Baseline = Literal["group", "turn", "batch"]


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


def turn_returns(turns: Turns, gamma: float) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """G_{i,t} of every played turn, and the same sum of |r|, the scale of its rounding error."""
    return reward_to_go(turns.reward, gamma)[turns.mask], reward_to_go(np.abs(turns.reward), gamma)[turns.mask]


def turn_return_advantage(
    batch: RolloutBatch,
    turns: Turns,
    *,
    gamma: float,
    normalise: Literal["std", "batch", "none"],
    baseline: Baseline,
    baseline_weighting: Weighting,
    delta: float,
    min_std: float,
) -> Float[np.ndarray, " N"]:
    """(G_{i,t} − baseline) / (max(spread, min_std) + δ) of every played turn; the arguments are those of
    `RewardToGo`."""
    everything_N = np.zeros_like(turns.group)
    statistic_N: dict[Baseline, Int[np.ndarray, " N"]] = {
        "group": turns.group,
        "turn": pairs_of(turns.group, turns.turn),
        "batch": everything_N,
    }
    return_N, magnitude_N = turn_returns(turns, gamma)
    weight_N = turn_weights(batch, turns, statistic_N[baseline], baseline_weighting)
    centred_N, std_N = centre_by_group(return_N, statistic_N[baseline], magnitude_N=magnitude_N, weight_N=weight_N)
    if normalise == "batch":
        batch_weight_N = turn_weights(batch, turns, everything_N, baseline_weighting)
        std_N = np.full_like(std_N, np.sqrt(np.average(centred_N**2, weights=batch_weight_N)))
    scale_N = 1.0 if normalise == "none" else np.maximum(std_N, min_std) + delta
    advantage_N: Float[np.ndarray, " N"] = centred_N / scale_N
    return advantage_N


@dataclass(frozen=True, kw_only=True)
class RewardToGo:
    """Credit by turn return: A_{i,t} = (G_{i,t} − baseline) / (spread + δ), G_{i,t} = Σ_{s≥t} γ^{s−t} r_{i,s}.

    ReBN is `baseline=batch` with `baseline_weighting=step`. `episode_adv`, which samplers weight by, is MS-GRPO's Â_i
    whatever the arguments here (γ does not enter), so that a comparison of credit rules draws episodes by one rule.
    """

    gamma: float = 1.0
    """Discount a turn, in [0, 1] [D]; 1 agrees with the undiscounted episode return."""
    normalise: Literal["std", "batch", "none"] = "std"
    """Divide by the std of the values the baseline is the mean of, by that of the whole batch, or by nothing [D]."""
    baseline: Baseline = "group"
    """Mean over all turns of the group, over the group's turns with the same index, or over the whole batch [D]."""
    baseline_weighting: Weighting = "episode"
    """What the baseline's and the batch's statistics count alike [D]. For the `turn` baseline every episode has one
    turn in a statistic, so `episode` and `step` are the same there."""
    delta: float = 1e-6
    """Added to the std [D]."""
    min_std: float = 0.0
    """Floor of the std, as in `EpisodeReturn` [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_normaliser(self.normalise, ("std", "batch", "none"), self.delta, self.min_std)
        check_between("gamma", self.gamma, 0.0, 1.0, "1 is the undiscounted return")
        check_choice("baseline", self.baseline, ("group", "turn", "batch"))
        check_weighting(self.baseline_weighting)

    @property
    def invariances(self) -> frozenset[str]:
        """Depends on the arguments: batch statistics couple groups, and only undiscounted sums shift alike."""
        names = {"state_blind"}
        if self.normalise != "batch" and self.baseline != "batch":
            names.add("group_independence")
        if self.gamma == 1.0 and self.baseline != "batch":
            names.add("return_shift")
        if self.normalise != "none" and self.min_std == 0.0:
            names.add("reward_scale")
        return ALWAYS | names

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages `[E, T]` from turn returns; `episode_adv` is MS-GRPO's."""
        turns = turns_of(batch)
        adv_N = turn_return_advantage(
            batch,
            turns,
            gamma=self.gamma,
            normalise=self.normalise,
            baseline=self.baseline,
            baseline_weighting=self.baseline_weighting,
            delta=self.delta,
            min_std=self.min_std,
        )
        return turn_credit(adv_N, turns, batch, delta=self.delta, min_std=self.min_std)
