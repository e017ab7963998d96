"""What a credit rule is, and the group statistics that rules share.

A credit rule is a frozen dataclass whose call turns a rollout into advantages. The arithmetic lives in pure functions
of arrays; a rule only chooses among them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from msgrpo_lab.types import Credit, RolloutBatch

INVARIANCES = {
    "episode_permutation": "reordering the episodes reorders the advantages in the same way",
    "group_relabel": "other numbers for the same groups change nothing",
    "group_independence": "a group's advantages do not depend on the rewards of other groups",
    "return_shift": "adding a constant a group to the last reward of each of its episodes changes nothing",
    "reward_scale": "multiplying all rewards by a positive number changes nothing, up to δ",
    "state_relabel": "other names for the same states change nothing",
    "state_blind": "which states were met plays no part",
}
"""Names a rule may declare in `invariances`; the conformance tests check each that is declared, and that what is not
declared does not hold either."""

ALWAYS = frozenset({"episode_permutation", "group_relabel", "state_relabel"})
"""What holds for every rule whatever its arguments: names carry no information."""

Normalise = Literal["std", "none"]
"""Divide a deviation by the spread of what the baseline is the mean of, or leave it in the unit of the reward."""

LARGEST = 1e6
"""Weights and floors are at most this: far beyond any use, and small enough that no sum of credit overflows."""

ROUNDING = 1e-12
"""A deviation from the group mean below this share of the summed |reward| is rounding, and becomes exactly 0."""


class CreditAssigner(Protocol):
    """Turns the rewards of a rollout into one advantage a turn."""

    @property
    def invariances(self) -> frozenset[str]:
        """The names in `INVARIANCES` that hold for this rule with these arguments."""

    def __call__(self, batch: RolloutBatch) -> Credit:
        """Advantages of every turn of `batch`; turns past an episode's end are masked and hold 0."""


def needs_oracle(rule: object) -> bool:
    """Whether a credit rule, or its class, reads `RolloutBatch.exact_adv`: it then says `needs_oracle = True`."""
    return getattr(rule, "needs_oracle", False) is True


class Rewards(NamedTuple):
    """Rewards of a rollout as a padded matrix."""

    reward: Float[np.ndarray, "E T"]
    """r_{i,t}; 0 past an episode's end."""
    mask: Bool[np.ndarray, "E T"]
    """True on the turns that were played."""


class Centred(NamedTuple):
    """Deviations from the mean of one's group, and the group's spread."""

    deviation: Float[np.ndarray, " N"]
    std: Float[np.ndarray, " N"]
    """Population standard deviation of the group each value belongs to."""


def rewards_of(batch: RolloutBatch) -> Rewards:
    """Rewards and turn mask of a rollout, both `[E, T]` with T the longest episode.

    Raises:
        ValueError: the batch is empty, an episode has no turn, a reward is not finite, or `group_index` is not `[E]`.
    """
    num_turns_E = batch.num_turns
    if num_turns_E.size == 0:
        raise ValueError("RolloutBatch.episodes is empty: credit needs at least one episode")
    if batch.group_index.shape != num_turns_E.shape:
        raise ValueError(
            f"RolloutBatch.group_index has shape {batch.group_index.shape}: give one number for each of the "
            f"{num_turns_E.size} episodes"
        )
    if num_turns_E.min() == 0:
        empty = int(num_turns_E.argmin())
        raise ValueError(f"RolloutBatch.episodes[{empty}] has no turns: leave unplayed episodes out of the batch")
    mask_ET = np.arange(num_turns_E.max()) < num_turns_E[:, None]
    reward_ET = np.zeros(mask_ET.shape)
    reward_ET[mask_ET] = np.fromiter(
        (turn.reward for episode in batch.episodes for turn in episode.turns), np.float64, count=int(num_turns_E.sum())
    )
    if not np.isfinite(reward_ET).all():
        episode, turn = np.argwhere(~np.isfinite(reward_ET))[0]
        raise ValueError(f"Turn.reward={reward_ET[episode, turn]} in episode {episode}, turn {turn}: must be finite")
    return Rewards(reward_ET, mask_ET)


def drop_rounding(
    value_N: Float[np.ndarray, " N"], group_N: Int[np.ndarray, " N"], *, magnitude_N: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """The values, with those of at most `ROUNDING` times the largest magnitude of their group set to exactly 0.

    `group_N` numbers the groups from 0 up; `magnitude_N` is as in `centre_by_group`.
    """
    magnitude_G = np.zeros(group_N.max(initial=-1) + 1)
    np.maximum.at(magnitude_G, group_N, magnitude_N)
    return np.where(np.abs(value_N) <= ROUNDING * magnitude_G[group_N], 0.0, value_N)


def centre_by_group(
    value_N: Float[np.ndarray, " N"],
    group_N: Int[np.ndarray, " N"],
    *,
    magnitude_N: Float[np.ndarray, " N"],
    weight_N: Float[np.ndarray, " N"] | None = None,
) -> Centred:
    """Deviation of each value from its group's mean, and the group's population std, both weighted.

    A sum of rewards carries rounding errors: 0.1 + 0.2 and 0.3 are the same return. A deviation of at most `ROUNDING`
    times the group's largest `magnitude_N` is therefore set to exactly 0, so that a group of equal returns gives
    exactly 0 and a zero advantage stays zero in any episode order.

    Args:
        value_N: values, in the unit of the reward.
        group_N: same number ⇔ same group.
        magnitude_N: Σ|r| of the rewards that were added up to the value, the scale of its rounding error.
        weight_N: positive weight of each value in mean and std; None is equal weights.
    """
    if not value_N.shape == group_N.shape == magnitude_N.shape or value_N.ndim != 1:
        raise ValueError(
            f"value, group and magnitude have shapes {value_N.shape}, {group_N.shape}, {magnitude_N.shape}: "
            "all must be the same [N]"
        )
    weight_N = np.ones_like(value_N) if weight_N is None else weight_N
    _, group_N = np.unique(group_N, return_inverse=True)
    total_G = np.bincount(group_N, weight_N)
    mean_G = np.bincount(group_N, weight_N * value_N) / total_G
    centred_N = drop_rounding(value_N - mean_G[group_N], group_N, magnitude_N=magnitude_N)
    std_G = np.sqrt(np.bincount(group_N, weight_N * centred_N**2) / total_G)
    return Centred(centred_N, std_G[group_N])


def relative_to_group(
    value_N: Float[np.ndarray, " N"],
    group_N: Int[np.ndarray, " N"],
    *,
    magnitude_N: Float[np.ndarray, " N"],
    weight_N: Float[np.ndarray, " N"] | None = None,
    normalise: Normalise,
    delta: float,
    min_std: float,
) -> Float[np.ndarray, " N"]:
    """Advantage of each value relative to its group: (value − mean) / (max(std, min_std) + δ), or the deviation alone.

    Mean and std are those of `centre_by_group`, whose arguments these are; a group without spread gives exactly 0.
    """
    centred_N, std_N = centre_by_group(value_N, group_N, magnitude_N=magnitude_N, weight_N=weight_N)
    if normalise == "none":
        return centred_N
    advantage_N: Float[np.ndarray, " N"] = centred_N / (np.maximum(std_N, min_std) + delta)
    return advantage_N


def check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a named option that does not exist.

    Raises:
        ValueError: one line that names the key, its value and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"credit.{key}={value!r}: is unknown; use one of {', '.join(allowed)}")


def check_between(key: str, value: float, low: float, high: float, meaning: str) -> None:
    """Refuses a number outside [low, high]; `meaning` tells what the usual value stands for.

    Raises:
        ValueError: one line that names the key, its value and the range.
    """
    if not low <= value <= high:
        raise ValueError(f"credit.{key}={value}: must lie in [{low:g}, {high:g}]; {meaning}")


def check_normaliser(normalise: str, allowed: tuple[str, ...], delta: float, min_std: float) -> None:
    """Refuses a normaliser that no credit rule can use.

    Raises:
        ValueError: one line that names the key, its value and what is allowed.
    """
    check_choice("normalise", normalise, allowed)
    if not 0.0 < delta <= LARGEST:
        raise ValueError(f"credit.delta={delta}: must be positive and at most {LARGEST:g}; 1e-6 is the reference value")
    check_between("min_std", min_std, 0.0, LARGEST, "0 is the paper's rule")


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
