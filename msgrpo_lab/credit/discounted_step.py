"""Discounted step credit: discounted turn returns, normalised over all turns of the group.

What a turn has earned from there on, worth less the later it came; each sampled turn is one row of the group's mean and
spread. Group Turn Policy Optimization (GTPO, arXiv 2511.14846) takes normalised discounted turn returns as advantages;
its normaliser and its self-supervised shaping of rewards are not taken over [D]. The arithmetic is that of
`reward_to_go` with a group baseline; the rule has a name of its own because its defaults (γ < 1, turns counted alike)
are a method of the literature, and reward-to-go's (γ = 1, episodes counted alike) agree with MS-GRPO instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgrpo_lab.credit.base import (
    ALWAYS,
    Normalise,
    Weighting,
    check_between,
    check_normaliser,
    check_weighting,
    turns_of,
)
from msgrpo_lab.credit.episode_return import turn_credit
from msgrpo_lab.credit.reward_to_go import turn_return_advantage
from msgrpo_lab.types import Credit, RolloutBatch


@dataclass(frozen=True, kw_only=True)
class DiscountedStep:
    """Credit by discounted turn return: A_{i,t} = (G_{i,t} − mean_g G) / (max(std_g G, min_std) + δ).

    G_{i,t} = Σ_{s≥t} γ^{s−t} r_{i,s}; mean and std over all turns of the group. With γ = 1, `episode` weighting and one
    reward at the end it is MS-GRPO. `episode_adv`, which samplers weight by, is MS-GRPO's Â_i.
    """

    gamma: float = 0.9
    """Discount a turn, in [0, 1]; 0.9 as in public GTPO configurations."""
    normalise: Normalise = "std"
    """Divide by the std of the group's turn returns, or give the deviation in the unit of the reward."""
    baseline_weighting: Weighting = "step"
    """What the group's mean and std count alike: each sampled turn is one row."""
    delta: float = 1e-6
    """Added to the std [D]."""
    min_std: float = 0.0
    """Floor of the std, as in `EpisodeReturn` [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_normaliser(self.normalise, ("std", "none"), self.delta, self.min_std)
        check_between("gamma", self.gamma, 0.0, 1.0, "1 is the undiscounted return")
        check_weighting(self.baseline_weighting)

    @property
    def invariances(self) -> frozenset[str]:
        """Only undiscounted sums shift alike; scale where the spread is divided out and has no floor."""
        names = {"group_independence", "state_blind"}
        if self.gamma == 1.0:
            names.add("return_shift")
        if self.normalise == "std" and self.min_std == 0.0:
            names.add("reward_scale")
        return ALWAYS | names

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages `[E, T]` from discounted turn returns; `episode_adv` is MS-GRPO's."""
        turns = turns_of(batch)
        adv_N = turn_return_advantage(
            batch,
            turns,
            gamma=self.gamma,
            normalise=self.normalise,
            baseline="group",
            baseline_weighting=self.baseline_weighting,
            delta=self.delta,
            min_std=self.min_std,
        )
        return turn_credit(adv_N, turns, batch, delta=self.delta, min_std=self.min_std)
