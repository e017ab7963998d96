"""Two methods, or one method at many thresholds: intervals and tests from few runs, as pure functions of arrays.

Axes as in `msgrpo_lab.intervals`: R runs (seeds) of one task, M tasks (scenarios), X thresholds, B bootstrap resamples.
Every random draw comes from the caller's generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from msgrpo_lab.intervals import NO_INTERVAL, Interval, probability_of_improvement

Scores = Sequence[Float[np.ndarray, " R"]]
"""M arrays of scores, one a task, one score a run."""


def sign_test(differences_N: Float[np.ndarray, " N"]) -> float:
    """Two-sided p-value of the sign test: how surprising so uneven a count of signs is if + and − are equally likely.

    Exact binomial; differences of 0 are dropped (Dixon & Mood 1946). With five pairs it cannot be below 0.0625.

    Raises:
        ValueError: a difference is not a finite number.
    """
    differences_N = np.asarray(differences_N, dtype=np.float64)
    if not np.isfinite(differences_N).all():
        raise ValueError("differences_N holds a value that is not finite: leave out pairs without two scores")
    wins, losses = int((differences_N > 0).sum()), int((differences_N < 0).sum())
    pairs = wins + losses
    tail = sum(math.comb(pairs, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2.0 * tail / 2.0**pairs)


def improvement_interval(
    x_MR: Scores,
    y_MR: Scores,
    rng: np.random.Generator,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
) -> Interval:
    """Percentile interval of `probability_of_improvement`, from resampling the runs of both methods within each task.

    Where every run of one method beats every run of the other it has no width (Agarwal et al. 2021 have the same): the
    runs at hand say nothing of how often that would fail.

    Args:
        x_MR: scores of the method asked about.
        y_MR: scores of the method it is compared with, on the same M tasks.
        rng: owner of the draws.
        level: coverage aimed at, in (0, 1).
        num_resamples: B.

    Returns:
        `NO_INTERVAL` as soon as a method has a single run of a task.

    Raises:
        ValueError: no tasks, a task without runs, or different numbers of tasks.
    """
    probability_of_improvement(x_MR, y_MR)  # refuses what cannot be compared
    if any(len(scores_R) < 2 for scores_R in (*x_MR, *y_MR)):
        return NO_INTERVAL
    draws_B = np.zeros(num_resamples)
    for x_R, y_R in zip(x_MR, y_MR, strict=True):
        x_BR, y_BR = (_resampled(np.asarray(scores_R), rng, num_resamples) for scores_R in (x_R, y_R))
        above_BRR = x_BR[:, :, None] > y_BR[:, None, :]
        equal_BRR = x_BR[:, :, None] == y_BR[:, None, :]
        draws_B += (above_BRR + 0.5 * equal_BRR).mean(axis=(1, 2)) / len(x_MR)
    low, high = np.quantile(draws_B, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(low), float(high))


def profile_band(
    scores_MR: Scores,
    thresholds_X: Float[np.ndarray, " X"],
    rng: np.random.Generator,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
) -> tuple[Float[np.ndarray, " X"], Float[np.ndarray, " X"]]:
    """Pointwise percentile band of `performance_profile`, from resampling runs within each task.

    Returns:
        Lower and upper ends, one a threshold; nan throughout as soon as a task has a single run.
    """
    thresholds_X = np.asarray(thresholds_X, dtype=np.float64)
    if any(len(scores_R) < 2 for scores_R in scores_MR):
        nothing_X = np.full(thresholds_X.shape, math.nan)
        return nothing_X, nothing_X.copy()
    profile_BX = np.zeros((num_resamples, thresholds_X.size))
    for scores_R in scores_MR:
        resampled_BR = _resampled(np.asarray(scores_R), rng, num_resamples)
        profile_BX += (resampled_BR[:, :, None] > thresholds_X).mean(axis=1) / len(scores_MR)
    low_X, high_X = np.quantile(profile_BX, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], axis=0)
    return low_X, high_X


def _resampled(
    scores_R: Float[np.ndarray, " R"], rng: np.random.Generator, num_resamples: int
) -> Float[np.ndarray, "B R"]:
    drawn_BR: Float[np.ndarray, "B R"] = scores_R[rng.integers(0, scores_R.size, (num_resamples, scores_R.size))]
    return drawn_BR
