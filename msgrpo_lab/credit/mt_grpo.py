"""MT-GRPO: the whole episode's outcome for every turn, and its own turn's reward for the turns before the last.

Source: "Reinforcing Multi-Turn Reasoning in LLM Agents via Turn-Level Credit Assignment" (arXiv 2505.11821) and its
authors' code. There an episode has two turns, a tool call with a reward of its own and an answer with the outcome
reward; both rewards are normalised in the group, the first turn gets A^O + λ A^T with λ = 1, the second A^O.

Ours [D]: any number of turns, each compared with the group's turns of the same index; the outcome is the episode's
return or the reward of its last turn, since a game has one stream of rewards; population std.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from msgrpo_lab.credit.base import (
    ALWAYS,
    LARGEST,
    Normalise,
    Rewards,
    Weighting,
    check_between,
    check_choice,
    check_normaliser,
    check_weighting,
    last_turns,
    matrix_of,
    pairs_of,
    relative_to_group,
    turn_weights,
    turns_of,
)
from msgrpo_lab.credit.episode_return import episode_advantage, turn_credit
from msgrpo_lab.types import Credit, RolloutBatch


@dataclass(frozen=True, kw_only=True)
class MTGRPO:
    """Credit by outcome and turn: A_{i,t} = Â^O_i + λ Â^T_{i,t}, without the second term on an episode's last turn.

    Â^O_i is the outcome and Â^T_{i,t} the reward r_{i,t} of turn t, each relative to its group:
    (value − mean) / (max(std, min_std) + δ). `episode_adv`, which samplers weight by, is MS-GRPO's Â_i.
    """

    turn_weight: float = 1.0
    """λ ≥ 0; 1 in the authors' code. 0 with `outcome=return` is MS-GRPO."""
    outcome: Literal["return", "last"] = "return"
    """R_i, which contains the turn rewards, or the reward of the last turn alone, which does not [D]."""
    baseline: Literal["turn", "group"] = "turn"
    """Turn rewards are compared with those of the same turn index, or with all of the group [D]; last turns left
    out."""
    normalise: Normalise = "std"
    """Divide each part by its std, or leave both in the unit of the reward."""
    baseline_weighting: Weighting = "step"
    """What the mean and std of turn rewards count alike [D]; the outcome's are over episodes. For the `turn` baseline
    `episode` and `step` are the same."""
    delta: float = 1e-6
    """Added to both stds [D]."""
    min_std: float = 0.0
    """Floor of both stds, as in `EpisodeReturn` [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_normaliser(self.normalise, ("std", "none"), self.delta, self.min_std)
        check_between("turn_weight", self.turn_weight, 0.0, LARGEST, "1 is the authors' λ")
        check_choice("outcome", self.outcome, ("return", "last"))
        check_choice("baseline", self.baseline, ("turn", "group"))
        check_weighting(self.baseline_weighting)

    @property
    def invariances(self) -> frozenset[str]:
        """A shift of last rewards moves outcomes alike, and turn rewards not at all."""
        names = {"group_independence", "return_shift", "state_blind"}
        if self.normalise == "std" and self.min_std == 0.0:
            names.add("reward_scale")
        return ALWAYS | names

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages `[E, T]` from outcome and turn rewards; `episode_adv` is MS-GRPO's."""
        turns = turns_of(batch)
        last_N = last_turns(turns)
        reward_N = turns.reward[turns.mask]
        last_reward_ET = matrix_of(np.where(last_N, reward_N, 0.0), turns.mask)
        outcome_E = episode_advantage(
            turns.rewards if self.outcome == "return" else Rewards(last_reward_ET, turns.mask),
            batch.group_index,
            normalise=self.normalise,
            delta=self.delta,
            min_std=self.min_std,
        )
        adv_N = outcome_E[turns.episode]
        statistic_N = turns.group if self.baseline == "group" else pairs_of(turns.group, turns.turn)
        # A last turn is a statistic of its own kind, so that it is neither compared nor counted with the others.
        statistic_N = pairs_of(statistic_N, last_N.astype(np.int64))
        turn_adv_N = relative_to_group(
            reward_N,
            statistic_N,
            magnitude_N=np.abs(reward_N),
            weight_N=turn_weights(batch, turns, statistic_N, self.baseline_weighting),
            normalise=self.normalise,
            delta=self.delta,
            min_std=self.min_std,
        )
        adv_N = adv_N + self.turn_weight * np.where(last_N, 0.0, turn_adv_N)
        return turn_credit(adv_N, turns, batch, delta=self.delta, min_std=self.min_std)
