"""GiGPO: the episode's advantage, and that of the turn among the group's turns in the same state.

Episodes of a group often pass through the same state. Turns that start there are compared with each other by what came
after them: a comparison of actions without any further rollouts. Source: "Group-in-Group Policy Optimization"
(arXiv 2505.10978, equations 3 to 8) and its authors' code (verl-agent): ω = 1, γ = 0.95.

Ours [D]: population std; the episode part counts episodes alike, as equation 3 has it (the authors' code counts batch
rows, so that long episodes weigh more). `same_turn` is ours: the value of a state with few turns left is another one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.credit.base import (
    ALWAYS,
    LARGEST,
    Normalise,
    Weighting,
    check_between,
    check_normaliser,
    check_weighting,
    group_states_of,
    relative_to_group,
    turn_weights,
    turns_of,
)
from msgrpo_lab.credit.episode_return import episode_advantage, turn_credit
from msgrpo_lab.credit.reward_to_go import turn_returns
from msgrpo_lab.types import Credit, RolloutBatch


@dataclass(frozen=True, kw_only=True)
class GiGPO:
    """Credit by episode and state: A_{i,t} = Â_i + ω (G_{i,t} − mean_s G) / (max(std_s G, min_std) + δ).

    Â_i is MS-GRPO's; G_{i,t} = Σ_{s≥t} γ^{s−t} r_{i,s}; mean_s and std_s are over the group's turns in the same
    state. A state that was met once gives 0. With ω = 0 it is MS-GRPO. `episode_adv`, which samplers weight by, is
    MS-GRPO's Â_i.
    """

    gamma: float = 0.95
    """Discount a turn, in [0, 1]; 0.95 in arXiv 2505.10978."""
    step_weight: float = 1.0
    """ω ≥ 0; 1 in arXiv 2505.10978."""
    same_turn: bool = False
    """Whether states are the same only at the same turn [D]; false in arXiv 2505.10978."""
    normalise: Normalise = "std"
    """Divide both parts by their std, or leave both in the unit of the reward; the paper's F_norm has both."""
    baseline_weighting: Weighting = "step"
    """What the mean and std of a state count alike: each visit in arXiv 2505.10978. The episode part counts
    episodes."""
    delta: float = 1e-6
    """Added to both stds; 1e-6 in the authors' code."""
    min_std: float = 0.0
    """Floor of both stds, as in `EpisodeReturn` [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_normaliser(self.normalise, ("std", "none"), self.delta, self.min_std)
        check_between("gamma", self.gamma, 0.0, 1.0, "0.95 is the paper's value")
        check_between("step_weight", self.step_weight, 0.0, LARGEST, "1 is the paper's ω")
        check_weighting(self.baseline_weighting)

    @property
    def invariances(self) -> frozenset[str]:
        """Without the step part those of MS-GRPO; with it, only undiscounted returns shift alike, and states matter."""
        names = {"group_independence"}
        if self.gamma == 1.0 or self.step_weight == 0.0:
            names.add("return_shift")
        if self.step_weight == 0.0:
            names.add("state_blind")
        if self.normalise == "std" and self.min_std == 0.0:
            names.add("reward_scale")
        return ALWAYS | names

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages `[E, T]` from episode and state; `episode_adv` is MS-GRPO's."""
        turns = turns_of(batch)
        state_N: Int[np.ndarray, " N"] = group_states_of(batch, turns, same_turn=self.same_turn)
        return_N, magnitude_N = turn_returns(turns, self.gamma)
        step_adv_N = relative_to_group(
            return_N,
            state_N,
            magnitude_N=magnitude_N,
            weight_N=turn_weights(batch, turns, state_N, self.baseline_weighting),
            normalise=self.normalise,
            delta=self.delta,
            min_std=self.min_std,
        )
        episode_adv_E = episode_advantage(
            turns.rewards,
            batch.group_index,
            normalise=self.normalise,
            delta=self.delta,
            min_std=self.min_std,
        )
        adv_N: Float[np.ndarray, " N"] = episode_adv_E[turns.episode] + self.step_weight * step_adv_N
        return turn_credit(adv_N, turns, batch, delta=self.delta, min_std=self.min_std)
