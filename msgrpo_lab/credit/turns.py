"""The played turns of a rollout side by side: which statistic each belongs to, and how much it counts there.

Arrays end in N, the number of played turns, in order of episode and turn (the order of `matrix[mask]`).

What does a mean over turns count alike? Rows of a batch are turns, so that a plain mean lets long episodes dominate
(reported in most multi-turn trainers). Every rule that takes such a mean therefore names its weighting:

- `episode`: every episode counts once in a statistic, shared equally by its turns there;
- `step`: every turn counts once;
- `token`: a turn counts as many times as its completion has tokens, as where token rows are averaged.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from msgrpo_lab.credit.base import Rewards, check_choice, rewards_of
from msgrpo_lab.types import RolloutBatch

Weighting = Literal["episode", "step", "token"]


class Turns(NamedTuple):
    """A rollout's turns as a padded matrix of rewards, and where each played turn belongs."""

    reward: Float[np.ndarray, "E T"]
    """r_{i,t}; 0 past an episode's end."""
    mask: Bool[np.ndarray, "E T"]
    """True on the turns that were played."""
    episode: Int[np.ndarray, " N"]
    turn: Int[np.ndarray, " N"]
    """t of each turn; 0 is an episode's first."""
    group: Int[np.ndarray, " N"]
    """0 to number of groups − 1."""

    @property
    def rewards(self) -> Rewards:
        """The padded matrix alone."""
        return Rewards(self.reward, self.mask)


def turns_of(batch: RolloutBatch) -> Turns:
    """The turns of a rollout; raises what `rewards_of` raises."""
    reward_ET, mask_ET = rewards_of(batch)
    _, group_E = np.unique(batch.group_index, return_inverse=True)
    episode_N, turn_N = np.nonzero(mask_ET)
    return Turns(reward_ET, mask_ET, episode_N, turn_N, group_E[episode_N])


def last_turns(turns: Turns) -> Bool[np.ndarray, " N"]:
    """True on the last turn of every episode."""
    last_N: Bool[np.ndarray, " N"] = turns.turn == turns.mask.sum(axis=1)[turns.episode] - 1
    return last_N


def matrix_of(value_N: Float[np.ndarray, " N"], mask_ET: Bool[np.ndarray, "E T"]) -> Float[np.ndarray, "E T"]:
    """One value a played turn as a matrix that holds 0 past an episode's end."""
    value_ET = np.zeros(mask_ET.shape)
    value_ET[mask_ET] = value_N
    return value_ET


def pairs_of(first_N: Int[np.ndarray, " N"], second_N: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """A number from 0 up for each distinct pair of numbers from 0 up: the statistic 'same first and same second'."""
    if first_N.size == 0:
        return first_N
    _, pair_N = np.unique(first_N * (second_N.max() + 1) + second_N, return_inverse=True)
    return pair_N


def states_of(batch: RolloutBatch) -> Int[np.ndarray, " N"]:
    """A number from 0 up for each distinct `state_key` of a rollout, one a played turn."""
    number_of: dict[object, int] = {}
    keys = (turn.state_key for episode in batch.episodes for turn in episode.turns)
    return np.fromiter((number_of.setdefault(key, len(number_of)) for key in keys), np.int64)


def group_states_of(batch: RolloutBatch, turns: Turns, *, same_turn: bool) -> Int[np.ndarray, " N"]:
    """A number from 0 up for each state of each group, or with `same_turn` for each state at each turn of each
    group."""
    node_N = pairs_of(turns.group, states_of(batch))
    return pairs_of(node_N, turns.turn) if same_turn else node_N


def tokens_of(batch: RolloutBatch) -> Float[np.ndarray, " N"]:
    """Completion tokens of every played turn.

    Raises:
        ValueError: a turn has none, so that it could not count in a mean over tokens.
    """
    counts = (turn.completion.token_ids.size for episode in batch.episodes for turn in episode.turns)
    tokens_N = np.fromiter(counts, np.float64)
    if tokens_N.size and tokens_N.min() == 0.0:
        raise ValueError("credit.baseline_weighting=token: a turn has a completion without tokens; use step or episode")
    return tokens_N


def turn_weights(
    batch: RolloutBatch, turns: Turns, statistic_N: Int[np.ndarray, " N"], weighting: Weighting
) -> Float[np.ndarray, " N"]:
    """How much each turn counts in the mean and spread of the statistic it belongs to (see the module's docstring).

    Args:
        batch: the rollout, for its completion lengths.
        turns: its turns.
        statistic_N: same number ⇔ same statistic; 0 upwards.
        weighting: what counts alike.
    """
    if weighting == "step":
        return np.ones(statistic_N.size)
    if weighting == "token":
        return tokens_of(batch)
    visit_N = pairs_of(statistic_N, turns.episode)
    weight_N: Float[np.ndarray, " N"] = 1.0 / np.bincount(visit_N)[visit_N]
    return weight_N


def episode_weights(batch: RolloutBatch, weighting: Weighting) -> Float[np.ndarray, " E"] | None:
    """How much each episode counts in a mean over episodes: once, T_i times, or once a completion token.

    None stands for equal weights.
    """
    if weighting == "episode":
        return None
    if weighting == "step":
        return batch.num_turns.astype(np.float64)
    return np.bincount(np.repeat(np.arange(len(batch.episodes)), batch.num_turns), tokens_of(batch))


def check_weighting(weighting: str) -> None:
    """Refuses an unknown baseline weighting; raises ValueError in one line."""
    check_choice("baseline_weighting", weighting, ("episode", "step", "token"))
