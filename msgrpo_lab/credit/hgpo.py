"""HGPO: turns compared in nested groups, of the same state, and of the same state and the same states before it.

Level k of K + 1 compares turns whose last k + 1 states agree. Deep levels compare like with like and are small, level 0
is large and mixes histories (it is GiGPO's step part); the levels are averaged with weights that grow with depth.
Source: "Hierarchy-of-Groups Policy Optimization" (arXiv 2602.22817, equations 3 to 7): w_k ∝ (k + 1)^α, α = 1,
γ = 0.95, K = 2 or 4, levels without advantage skipped. The authors' code (verl-agent) weighs level k by (k + 2)^α.

Ours [D]: a level is skipped where its group has no spread (alone, or all returns equal), so the weights are of levels
that could have told something; `episode_weight`, with which the rule contains GiGPO.

Beware: the method mends a mismatch between prompts that hold some history. Here a prompt holds the current state only
[P], so level 0 already compares turns of equal prompts, and deeper levels only take out what differs by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.credit.base import (
    ALWAYS,
    LARGEST,
    Normalise,
    Turns,
    Weighting,
    centre_by_group,
    check_between,
    check_normaliser,
    check_weighting,
    group_states_of,
    pairs_of,
    turn_weights,
    turns_of,
)
from msgrpo_lab.credit.episode_return import episode_advantage, turn_credit
from msgrpo_lab.credit.reward_to_go import turn_returns
from msgrpo_lab.types import Credit, RolloutBatch


def history_levels(state_N: Int[np.ndarray, " N"], turns: Turns, history: int) -> Iterator[Int[np.ndarray, " N"]]:
    """For k = 0 … `history`, the statistic each turn belongs to on level k.

    Two turns with k turns before them share a statistic iff group and last k + 1 states agree (`state_N` holds both).
    A turn with fewer before it is alone in its statistic.
    """
    level_N, alone_N = state_N, np.arange(state_N.size)
    yield level_N
    for k in range(1, history + 1):
        # In the order of episode and turn, the turn before is the neighbour on the left; what the first turns of an
        # episode find there is another episode's, and they are alone on this level and reached by none on the next.
        level_N = pairs_of(np.roll(level_N, 1), state_N)
        reaches_N = turns.turn >= k
        yield pairs_of(np.where(reaches_N, level_N, alone_N), reaches_N.astype(np.int64))


@dataclass(frozen=True, kw_only=True)
class HGPO:
    """Credit by history: A_{i,t} = Σ_k w_k A^k_{i,t} / Σ_k w_k over the levels k that have spread, w_k = (k + 1)^α.

    A^k_{i,t} = (G_{i,t} − mean_k G) / (max(std_k G, min_std) + δ) over the group's turns whose last k + 1 states are
    those of turn t; G_{i,t} = Σ_{s≥t} γ^{s−t} r_{i,s}. A turn without any such level gets 0. `episode_weight` adds that
    many times MS-GRPO's Â_i, which is also `episode_adv`, that samplers weight by.
    """

    history: int = 2
    """K ≥ 0, states before the current one; 2 and 4 in arXiv 2602.22817. 0 is the step part of GiGPO."""
    alpha: float = 1.0
    """Exponent of the level weights, ≥ 0; 1 in arXiv 2602.22817, 0 weighs levels alike."""
    gamma: float = 0.95
    """Discount a turn, in [0, 1]; 0.95 in arXiv 2602.22817."""
    episode_weight: float = 0.0
    """How many times Â_i is added, ≥ 0 [D]; 0 is the published method."""
    same_turn: bool = False
    """Whether states are the same only at the same turn, as in `GiGPO` [D]."""
    normalise: Normalise = "std"
    """Divide by the std of each level, or leave deviations in the unit of the reward."""
    baseline_weighting: Weighting = "step"
    """What the mean and std of a level count alike: each visit in arXiv 2602.22817."""
    delta: float = 1e-6
    """Added to the stds; 1e-6 in the authors' code."""
    min_std: float = 0.0
    """Floor of the stds, as in `EpisodeReturn` [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_normaliser(self.normalise, ("std", "none"), self.delta, self.min_std)
        check_between("history", self.history, 0, 1000, "2 is the paper's K")
        check_between("alpha", self.alpha, 0.0, 64.0, "1 is the paper's α")
        check_between("gamma", self.gamma, 0.0, 1.0, "0.95 is the paper's value")
        check_between("episode_weight", self.episode_weight, 0.0, LARGEST, "0 is the published method")
        check_weighting(self.baseline_weighting)

    @property
    def invariances(self) -> frozenset[str]:
        """Only undiscounted returns shift alike; scale where the spread is divided out and has no floor."""
        names = {"group_independence"}
        if self.gamma == 1.0:
            names.add("return_shift")
        if self.normalise == "std" and self.min_std == 0.0:
            names.add("reward_scale")
        return ALWAYS | names

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages `[E, T]` from all levels; `episode_adv` is MS-GRPO's."""
        turns = turns_of(batch)
        state_N = group_states_of(batch, turns, same_turn=self.same_turn)
        return_N, magnitude_N = turn_returns(turns, self.gamma)
        sum_N, total_N = np.zeros_like(return_N), np.zeros_like(return_N)
        for k, statistic_N in enumerate(history_levels(state_N, turns, self.history)):
            centred_N, std_N = centre_by_group(
                return_N,
                statistic_N,
                magnitude_N=magnitude_N,
                weight_N=turn_weights(batch, turns, statistic_N, self.baseline_weighting),
            )
            scale_N = np.maximum(std_N, self.min_std) + self.delta if self.normalise == "std" else 1.0
            level_weight_N = (k + 1.0) ** self.alpha * (std_N > 0.0)
            sum_N += level_weight_N * centred_N / scale_N
            total_N += level_weight_N
        step_adv_N: Float[np.ndarray, " N"] = np.divide(sum_N, total_N, out=np.zeros_like(sum_N), where=total_N > 0.0)
        episode_adv_E = episode_advantage(
            turns.rewards,
            batch.group_index,
            normalise=self.normalise,
            delta=self.delta,
            min_std=self.min_std,
        )
        adv_N = self.episode_weight * episode_adv_E[turns.episode] + step_adv_N
        return turn_credit(adv_N, turns, batch, delta=self.delta, min_std=self.min_std)
