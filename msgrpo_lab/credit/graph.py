"""Graph credit: how near to success a turn has led, on the merged graph of all that the group has seen.

Equal states of a group's episodes are one node, a turn is an edge, and success is a node of its own. A node's
distance is the length of the shortest known way to success, even if no single episode walked it, so that a good move
in a lost episode is seen, and a useless one in a won episode. Source: GraphGPO ("Beyond Trajectory-Level Attribution:
Graph-Based Credit Assignment for Agentic Reinforcement Learning", arXiv 2605.26684) and its authors' code: reward of
a turn γ^d' with d' the distance of the state it led to, γ = 0.1; states from which success is not known to be
reachable are one farther than the farthest; turns that start in the same state are compared, and the episode's
advantage is added, both with weight 1. (The code's constant factor of 10 on the reward falls out with the std and is
left out.)

Ours [D]: population std; progress is measured from the distance d of the state left, P = γ^(d' − d + 1), an option of
the code: among turns that start in one state this is a constant factor, which the std divides out, while γ^d' far
from success is smaller than δ and would vanish beside it (with γ = 0.1 beyond some six turns); a lost episode that
was cut off by the horizon has an unknown last state, so the step part of its last turn is 0 and that turn is not
compared; `episode_weight=0` leaves progress alone.

Beware: the graph takes chance for choice. On slippery ice an edge that was luck counts as a way. Success is the
game's own criterion; where that is to survive (Snake) the distance counts the turns left, and states hardly ever
repeat.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from msgrpo_lab.credit.base import (
    ALWAYS,
    LARGEST,
    Normalise,
    Turns,
    Weighting,
    check_between,
    check_normaliser,
    check_weighting,
    group_states_of,
    last_turns,
    pairs_of,
    relative_to_group,
    turn_weights,
    turns_of,
)
from msgrpo_lab.credit.episode_return import episode_advantage, turn_credit
from msgrpo_lab.types import Credit, RolloutBatch


def distances_to_success(
    state_N: Int[np.ndarray, " N"], turns: Turns, last_N: Bool[np.ndarray, " N"], success_N: Bool[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Distance to success, in turns, of the state each turn starts in and of the state it leads to.

    `state_N` numbers the states of each group; a turn leads to the state of the next one, to success where it is the
    last of a won episode, and out of the graph where it is the last of a lost one. What cannot reach success is one
    farther than the farthest state of its group that can.
    """
    distance_S = np.full(state_N.max() + 1, np.inf)
    distance_S[state_N[last_N & success_N]] = 1.0
    from_M, to_M = state_N[:-1][~last_N[:-1]], state_N[1:][~last_N[:-1]]
    # Every round settles the states one turn farther away, so there are as many rounds as the longest shortest way.
    while True:
        before_S = distance_S.copy()
        np.minimum.at(distance_S, from_M, before_S[to_M] + 1.0)
        if np.array_equal(before_S, distance_S):
            break
    start_N = distance_S[state_N]
    farthest_G = np.zeros(turns.group.max() + 1)
    reached_N = np.isfinite(start_N)
    np.maximum.at(farthest_G, turns.group[reached_N], start_N[reached_N])
    beyond_N = farthest_G[turns.group] + 1.0
    end_N = np.where(last_N, np.where(success_N, 0.0, np.inf), np.roll(start_N, -1))
    return np.where(reached_N, start_N, beyond_N), np.where(np.isfinite(end_N), end_N, beyond_N)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Credit by progress: A_{i,t} = w Â_i + ω (P_{i,t} − mean_s P) / (std_s P + δ).

    P_{i,t} = γ^{d' − d + 1}, d and d' the distances to success of the states that turn t left and led to; mean_s and
    std_s are over the group's turns that start in the same state. A group without success has no progress. Â_i is
    MS-GRPO's, and also `episode_adv`, which samplers weight by. Rewards enter through Â_i alone.
    """

    gamma: float = 0.1
    """Decay of progress with distance, in [0, 1]; 0.1 in the authors' code."""
    step_weight: float = 1.0
    """ω ≥ 0; 1 in the authors' code."""
    episode_weight: float = 1.0
    """w ≥ 0; 1 in the authors' code, 0 is progress alone."""
    relative_distance: bool = True
    """False is P = γ^{d'}, the authors' default."""
    normalise: Normalise = "std"
    """Divide both parts by their std, or leave the episode part in reward units and progress in [0, 1]."""
    baseline_weighting: Weighting = "step"
    """What the mean and std of a state count alike: each visit in the authors' code. The episode part counts
    episodes."""
    delta: float = 1e-6
    """Added to both stds; 1e-6 in the authors' code."""
    min_std: float = 0.0
    """Floor of the episode part's std, as in `EpisodeReturn` [D]; progress has another unit and no floor."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_normaliser(self.normalise, ("std", "none"), self.delta, self.min_std)
        check_between("gamma", self.gamma, 0.0, 1.0, "0.1 is the authors' value")
        check_between("step_weight", self.step_weight, 0.0, LARGEST, "1 is the authors' value")
        check_between("episode_weight", self.episode_weight, 0.0, LARGEST, "1 is the authors' value")
        check_weighting(self.baseline_weighting)

    @property
    def invariances(self) -> frozenset[str]:
        """Progress does not see rewards; the episode part has the invariances of MS-GRPO."""
        names = {"group_independence", "return_shift"}
        if self.step_weight == 0.0:
            names.add("state_blind")
        if self.episode_weight == 0.0 or (self.normalise == "std" and self.min_std == 0.0):
            names.add("reward_scale")
        return ALWAYS | names

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages `[E, T]` from episode and progress; `episode_adv` is MS-GRPO's."""
        turns = turns_of(batch)
        last_N = last_turns(turns)
        success_E = np.array([episode.success for episode in batch.episodes])
        cut_off_E = np.array([episode.truncated and not episode.terminated for episode in batch.episodes]) & ~success_E
        state_N = group_states_of(batch, turns, same_turn=False)
        start_N, end_N = distances_to_success(state_N, turns, last_N, success_E[turns.episode])
        progress_N = self.gamma ** (end_N - start_N + 1.0 if self.relative_distance else end_N)
        known_N = ~(last_N & cut_off_E[turns.episode])
        # Turns that led to unknown states are compared with none but each other; all stand one beyond the farthest: 0.
        statistic_N = pairs_of(state_N, known_N.astype(np.int64))
        step_adv_N = relative_to_group(
            progress_N,
            statistic_N,
            magnitude_N=progress_N,
            weight_N=turn_weights(batch, turns, statistic_N, self.baseline_weighting),
            normalise=self.normalise,
            delta=self.delta,
            min_std=0.0,
        )
        episode_adv_E = episode_advantage(
            turns.rewards, batch.group_index, normalise=self.normalise, delta=self.delta, min_std=self.min_std
        )
        adv_N = self.episode_weight * episode_adv_E[turns.episode] + self.step_weight * step_adv_N
        return turn_credit(adv_N, turns, batch, delta=self.delta, min_std=self.min_std)
