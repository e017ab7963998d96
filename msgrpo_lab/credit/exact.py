"""Exact credit: the advantage that the oracle has computed, the upper bound of what a credit rule can know.

A^π_t(s, a) = Q^π_t(s, a) − V^π_t(s) of the policy that has sampled the rollout (Sutton et al. 2000, the policy gradient
theorem), by dynamic programming or by simulation; see `oracle/`. This rule only reads it from the rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float

from msgrpo_lab.credit.base import ALWAYS, Turns, Weighting, check_normaliser, check_weighting, turn_weights, turns_of
from msgrpo_lab.credit.episode_return import turn_credit
from msgrpo_lab.types import Credit, RolloutBatch


def exact_advantage(batch: RolloutBatch, turns: Turns) -> Float[np.ndarray, " N"]:
    """`RolloutBatch.exact_adv` of every played turn.

    Raises:
        ValueError: there is none, it is not `[E, T]`, not finite, or not 0 past an episode's end.
    """
    if batch.exact_adv is None:
        raise ValueError(
            "credit=exact needs RolloutBatch.exact_adv, which is None: use an environment with an oracle (frozenlake*) "
            "and have it fill the rollout before credit is assigned, or choose another credit rule"
        )
    if batch.exact_adv.shape != turns.mask.shape:
        raise ValueError(
            f"RolloutBatch.exact_adv has shape {batch.exact_adv.shape}: credit=exact needs {turns.mask.shape}, "
            "one number for every turn of every episode"
        )
    wrong_ET = ~np.isfinite(batch.exact_adv) | (~turns.mask & (batch.exact_adv != 0.0))
    if wrong_ET.any():
        episode, turn = np.argwhere(wrong_ET)[0]
        raise ValueError(
            f"RolloutBatch.exact_adv[{episode}, {turn}]={batch.exact_adv[episode, turn]}: must be finite, and 0 past "
            "the episode's end"
        )
    adv_N: Float[np.ndarray, " N"] = batch.exact_adv[turns.mask].astype(np.float64)
    return adv_N


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Credit by the oracle: A_{i,t} = A^π_t(s_{i,t}, a_{i,t}), in reward units, or divided by one number a rollout.

    Nothing is centred: the mean of A^π over the policy's actions is 0 in every state. `episode_adv`, which samplers
    weight by, is MS-GRPO's Â_i.
    """

    needs_oracle: ClassVar[bool] = True
    """Rollouts are given `exact_adv` before this rule sees them."""

    normalise: Literal["none", "batch"] = "none"
    """Leave the unit of the reward, or divide by the root mean square over the rollout's turns, so that learning rates
    compare with those of rules that divide by a std [D]."""
    baseline_weighting: Weighting = "episode"
    """What that mean counts alike [D]."""
    delta: float = 1e-6
    """Added to the root mean square, and to the std of `episode_adv` [D]."""
    min_std: float = 0.0
    """Floor of both, as in `EpisodeReturn` [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_normaliser(self.normalise, ("none", "batch"), self.delta, self.min_std)
        check_weighting(self.baseline_weighting)

    @property
    def invariances(self) -> frozenset[str]:
        """Of A^π itself: a return that is shifted whatever one does makes no action better, and scale is the
        reward's."""
        names = {"return_shift", "state_blind"}
        if self.normalise == "none":
            names.add("group_independence")
        elif self.min_std == 0.0:
            names.add("reward_scale")
        return ALWAYS | names

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages `[E, T]` of the oracle; `episode_adv` is MS-GRPO's."""
        turns = turns_of(batch)
        adv_N = exact_advantage(batch, turns)
        if self.normalise == "batch":
            weight_N = turn_weights(batch, turns, np.zeros_like(turns.group), self.baseline_weighting)
            root_mean_square = float(np.sqrt(np.average(adv_N**2, weights=weight_N)))
            adv_N = adv_N / (max(root_mean_square, self.min_std) + self.delta)
        return turn_credit(adv_N, turns, batch, delta=self.delta, min_std=self.min_std)
