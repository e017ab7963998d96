"""Two policies on the same episodes: the difference with its interval, how often one does better, and a sign test.

Both play the same initial states with the same streams of chance (common random numbers), so the difference is taken
episode by episode, and what they share cancels. Intervals and p-values are over episodes, for these two very policies;
of training runs with other seeds they say nothing, and they are not corrected for the number of comparisons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest
from scipy.stats import t as student

from msgrpo_lab.evaluation.contender import Decoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What `compare_returns` finds, for one policy against another."""

    difference: float
    """Mean over episodes of the policy's return minus the other's."""
    difference_low: float
    difference_high: float
    """95 % interval, Student's t over the paired differences; nan for a single episode."""
    probability_of_improvement: float
    """Share of episodes in which the policy's return is higher, equal ones counted half."""
    probability_of_improvement_low: float
    probability_of_improvement_high: float
    wins: int
    losses: int
    ties: int
    sign_test_p: float
    """Two-sided p-value of as many wins among wins and losses if both were as likely; 1 where all are ties."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A pair, and who it is of."""

    scenario: str
    decoding: Decoding
    """Of both; a player has no other than sampled and is compared as it is."""
    policy: str
    against: str
    episodes: int
    pair: Pair


def compare_returns(ours: Float[np.ndarray, " E"], theirs: Float[np.ndarray, " E"]) -> Pair:
    """One policy's returns held against another's on the same episodes.

    Raises:
        ValueError: the numbers of episodes differ, or there are none.
    """
    if ours.shape != theirs.shape or not len(ours):
        raise ValueError(f"returns: {ours.shape} against {theirs.shape}; both must be of the same episodes")
    difference = ours - theirs
    better = (difference > 0) + 0.5 * (difference == 0)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    low, high = _t_interval(difference)
    better_low, better_high = (float(np.clip(end, 0.0, 1.0)) for end in _t_interval(better))
    return Pair(
        difference=float(difference.mean()),
        difference_low=low,
        difference_high=high,
        probability_of_improvement=float(better.mean()),
        probability_of_improvement_low=better_low,
        probability_of_improvement_high=better_high,
        wins=wins,
        losses=losses,
        ties=len(difference) - wins - losses,
        sign_test_p=float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
    )


def _t_interval(values: Float[np.ndarray, " E"]) -> tuple[float, float]:
    """95 % interval of the mean of independent values; (nan, nan) for a single one."""
    count = len(values)
    if count < 2:
        return float("nan"), float("nan")
    half = float(student.ppf(0.975, count - 1)) * float(values.std(ddof=1)) / math.sqrt(count)
    return float(values.mean()) - half, float(values.mean()) + half
