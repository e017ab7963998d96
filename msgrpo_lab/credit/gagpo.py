"""GAGPO: generalised advantage estimation with a value that is an average, not a network.

The value of a state is the mean discounted return of the group's visits to it; temporal differences of these values are
summed as in GAE (Schulman et al., arXiv 1506.02438), and the result is normalised in the group. Source: "GAGPO:
Generalized Advantage Grouped Policy Optimization" (arXiv 2605.13217): grouped value, temporal recursion and group
normalisation are the paper's. Its equations and constants were not open to this project: γ is GiGPO's, λ that of common
GAE practice, the centring in the group and the value 0 after the last turn are ours [D], as are `value_pool`,
`leave_one_out` and `same_turn`.

λ = 1 is discounted return minus value; λ = 0 is one step's temporal difference, of low variance, and biased as far as
the values are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.credit.base import (
    ALWAYS,
    Normalise,
    Weighting,
    check_between,
    check_choice,
    check_normaliser,
    check_weighting,
    drop_rounding,
    group_states_of,
    matrix_of,
    pairs_of,
    relative_to_group,
    states_of,
    turn_weights,
    turns_of,
)
from msgrpo_lab.credit.episode_return import turn_credit
from msgrpo_lab.credit.reward_to_go import reward_to_go, turn_returns
from msgrpo_lab.types import Credit, RolloutBatch


def mean_of_visits(
    return_N: Float[np.ndarray, " N"],
    state_N: Int[np.ndarray, " N"],
    episode_N: Int[np.ndarray, " N"],
    weight_N: Float[np.ndarray, " N"],
    *,
    leave_one_out: bool,
) -> Float[np.ndarray, " N"]:
    """Value of the state of each turn: the weighted mean of the returns of all visits to it.

    With `leave_one_out` the visits of the turn's own episode are left out where another episode has been there too.
    """
    weight_S, sum_S = np.bincount(state_N, weight_N), np.bincount(state_N, weight_N * return_N)
    mean_N: Float[np.ndarray, " N"] = (sum_S / weight_S)[state_N]
    if not leave_one_out:
        return mean_N
    own_N = pairs_of(state_N, episode_N)
    _, first_V = np.unique(own_N, return_index=True)
    shared_N = np.bincount(state_N[first_V], minlength=weight_S.size)[state_N] > 1
    other_weight_N = weight_S[state_N] - np.bincount(own_N, weight_N)[own_N]
    other_sum_N = sum_S[state_N] - np.bincount(own_N, weight_N * return_N)[own_N]
    np.divide(other_sum_N, other_weight_N, out=mean_N, where=shared_N)
    return mean_N


def generalised_advantage(
    reward_ET: Float[np.ndarray, "E T"], value_ET: Float[np.ndarray, "E T"], *, gamma: float, lam: float
) -> Float[np.ndarray, "E T"]:
    """Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V(s_{t+1}) − V(s_t) (arXiv 1506.02438, equation 16).

    Both arrays hold 0 past an episode's end, so the value after the last turn is 0, and so is the result there.
    """
    next_ET = np.zeros_like(value_ET)
    next_ET[:, :-1] = value_ET[:, 1:]
    return reward_to_go(reward_ET + gamma * next_ET - value_ET, gamma * lam)


@dataclass(frozen=True, kw_only=True)
class GAGPO:
    """Credit by temporal differences: A_{i,t} = Σ_l (γλ)^l (r_{i,t+l} + γ V(s_{i,t+l+1}) − V(s_{i,t+l})), normalised.

    V(s) is the mean discounted return of the visits to s. With `normalise=std` the group's mean is taken off and its
    std divided out, over all turns of the group. `episode_adv`, which samplers weight by, is MS-GRPO's Â_i.
    """

    gamma: float = 0.95
    """Discount a turn, in [0, 1] [D]: the value of arXiv 2505.10978."""
    lam: float = 0.95
    """λ in [0, 1] [D]: 1 trusts the episode's own return, 0 the values of the states met."""
    value_pool: Literal["group", "batch"] = "group"
    """Visits whose returns make a value: those of the group, or of all groups that met the state, which is right
    where a state key names the map [D]."""
    leave_one_out: bool = False
    """Leave the episode's own visits out of the values it is measured by, where others have been there [D]."""
    same_turn: bool = False
    """Whether states are the same only at the same turn, as in `GiGPO` [D]."""
    normalise: Normalise = "std"
    """Centre in the group and divide by its std, or leave the advantage as it is, in the unit of the reward."""
    baseline_weighting: Weighting = "step"
    """What values, and the group's mean and std, count alike [D]: each visit."""
    delta: float = 1e-6
    """Added to the std [D]."""
    min_std: float = 0.0
    """Floor of the std, as in `EpisodeReturn` [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_normaliser(self.normalise, ("std", "none"), self.delta, self.min_std)
        check_between("gamma", self.gamma, 0.0, 1.0, "1 is the undiscounted return")
        check_between("lam", self.lam, 0.0, 1.0, "1 is return minus value")
        check_choice("value_pool", self.value_pool, ("group", "batch"))
        check_weighting(self.baseline_weighting)

    @property
    def invariances(self) -> frozenset[str]:
        """Values of a pool couple its groups, and only undiscounted returns of one group shift alike."""
        names = set()
        if self.value_pool == "group":
            names.add("group_independence")
            if self.gamma == 1.0:
                names.add("return_shift")
        if self.normalise == "std" and self.min_std == 0.0:
            names.add("reward_scale")
        return ALWAYS | names

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages `[E, T]` from temporal differences; `episode_adv` is MS-GRPO's."""
        turns = turns_of(batch)
        if self.value_pool == "group":
            state_N = group_states_of(batch, turns, same_turn=self.same_turn)
        else:
            state_N = states_of(batch)
            state_N = pairs_of(state_N, turns.turn) if self.same_turn else state_N
        return_N, magnitude_N = turn_returns(turns, self.gamma)
        value_N = mean_of_visits(
            return_N,
            state_N,
            turns.episode,
            turn_weights(batch, turns, state_N, self.baseline_weighting),
            leave_one_out=self.leave_one_out,
        )
        adv_ET = generalised_advantage(turns.reward, matrix_of(value_N, turns.mask), gamma=self.gamma, lam=self.lam)
        # What an advantage sums up: rewards and values, and no value is larger than the largest return of its state.
        largest_S = np.zeros(state_N.max() + 1)
        np.maximum.at(largest_S, state_N, magnitude_N)
        largest_ET = matrix_of(largest_S[state_N], turns.mask)
        summed_ET = generalised_advantage(
            np.abs(turns.reward) + 2.0 * largest_ET, largest_ET, gamma=self.gamma, lam=self.lam
        )
        adv_N = drop_rounding(adv_ET[turns.mask], turns.group, magnitude_N=summed_ET[turns.mask])
        if self.normalise == "std":
            adv_N = relative_to_group(
                adv_N,
                turns.group,
                magnitude_N=summed_ET[turns.mask],
                weight_N=turn_weights(batch, turns, turns.group, self.baseline_weighting),
                normalise="std",
                delta=self.delta,
                min_std=self.min_std,
            )
        return turn_credit(adv_N, turns, batch, delta=self.delta, min_std=self.min_std)
