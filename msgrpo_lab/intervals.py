"""Statistics of few runs, as pure functions of arrays; every random draw comes from the caller's generator.

Axes: R runs (seeds) of one task, M tasks (scenarios), X thresholds, B bootstrap resamples. Scores of several tasks are
a sequence of M arrays, so that tasks may differ in their number of runs.

Source of the IQM, the stratified bootstrap, the performance profile and the probability of improvement: R. Agarwal,
M. Schwarzer, P. S. Castro, A. Courville, M. G. Bellemare, *Deep Reinforcement Learning at the Edge of the Statistical
Precipice*, NeurIPS 2021 (arXiv 2108.13264), the paper behind `rliable`, whose numbers these functions reproduce.

An interval over runs does not exist for a single run. It is `nan` then, never a stand-in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Statistic = Callable[[Sequence[Float[np.ndarray, " R"]]], float]
"""A number computed from the scores of M tasks."""


class Interval(NamedTuple):
    """A two-sided interval, both ends included."""

    low: float
    high: float


NO_INTERVAL = Interval(math.nan, math.nan)
"""What a single run has."""


def _tasks(scores_MR: Sequence[Float[np.ndarray, " R"]]) -> list[Float[np.ndarray, " R"]]:
    tasks = [np.asarray(scores_R, dtype=np.float64) for scores_R in scores_MR]
    if not tasks:
        raise ValueError("scores_MR is empty: give at least one task")
    for index, scores_R in enumerate(tasks):
        if scores_R.ndim != 1 or scores_R.size == 0:
            raise ValueError(f"scores_MR[{index}] has shape {scores_R.shape}: give one score a run, at least one run")
    return tasks


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level}: give a probability between 0 and 1, such as 0.95")


def mean_of_means(scores_MR: Sequence[Float[np.ndarray, " R"]]) -> float:
    """The mean over tasks of each task's mean over runs, so that a task with more runs weighs no more."""
    return float(np.mean([scores_R.mean() for scores_R in _tasks(scores_MR)]))


def iqm(scores_MR: Sequence[Float[np.ndarray, " R"]]) -> float:
    """Interquartile mean: the mean of the middle half of all M·R scores pooled (Agarwal et al. 2021, section 4.3).

    The lowest and the highest ⌊N/4⌋ of the N pooled scores are dropped, as `rliable` and `scipy.stats.trim_mean` do.
    Tasks with more runs weigh more: pool equal numbers of runs where that matters.
    """
    pooled_N = np.sort(np.concatenate(_tasks(scores_MR)))
    cut = pooled_N.size // 4
    return float(pooled_N[cut : pooled_N.size - cut].mean())


def stratified_bootstrap(
    scores_MR: Sequence[Float[np.ndarray, " R"]],
    statistic: Statistic,
    rng: np.random.Generator,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
) -> Interval:
    """Percentile interval of a statistic, from resampling runs within each task (Agarwal et al. 2021, section 4.1).

    Every resample draws, for every task on its own, as many runs as the task has, with replacement. Below about five
    runs a task the percentile interval is known to be too narrow; it still says more than none.

    Args:
        scores_MR: M arrays of scores, one a task, one score a run.
        statistic: what the interval is of, such as `iqm` or `mean_of_means`.
        rng: owner of the draws.
        level: coverage aimed at, in (0, 1).
        num_resamples: B.

    Returns:
        The (1 − level)/2 and (1 + level)/2 quantiles of the B resampled statistics; `NO_INTERVAL` as soon as one task
        has a single run, because that run's spread is unknown, not zero.

    Raises:
        ValueError: no tasks, a task without runs, a level outside (0, 1), or fewer than one resample.
    """
    tasks = _tasks(scores_MR)
    _check_level(level)
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples}: give at least 1")
    if any(scores_R.size < 2 for scores_R in tasks):
        return NO_INTERVAL
    draws_B = np.array(
        [
            statistic([scores_R[rng.integers(0, scores_R.size, scores_R.size)] for scores_R in tasks])
            for _ in range(num_resamples)
        ]
    )
    low, high = np.quantile(draws_B, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(low), float(high))


def performance_profile(
    scores_MR: Sequence[Float[np.ndarray, " R"]], thresholds_X: Float[np.ndarray, " X"]
) -> Float[np.ndarray, " X"]:
    """Share of runs above each threshold, F(τ) = mean_m mean_r 1[x_mr > τ] (Agarwal et al. 2021, section 4.2)."""
    thresholds_X = np.asarray(thresholds_X, dtype=np.float64)
    profile_MX = [(scores_R[:, None] > thresholds_X[None, :]).mean(axis=0) for scores_R in _tasks(scores_MR)]
    result_X: Float[np.ndarray, " X"] = np.mean(profile_MX, axis=0)
    return result_X


def probability_of_improvement(
    x_MR: Sequence[Float[np.ndarray, " R"]], y_MR: Sequence[Float[np.ndarray, " R"]]
) -> float:
    """P(X > Y), ties counting half, on a task drawn at random (Agarwal et al. 2021, section 4.3; Mann-Whitney U).

    Args:
        x_MR: scores of the method asked about, M tasks.
        y_MR: scores of the method it is compared with, the same M tasks in the same order; runs need not be as many.

    Raises:
        ValueError: different numbers of tasks, or a task without runs.
    """
    x_tasks, y_tasks = _tasks(x_MR), _tasks(y_MR)
    if len(x_tasks) != len(y_tasks):
        raise ValueError(f"x_MR has {len(x_tasks)} tasks and y_MR {len(y_tasks)}: compare on the same tasks")
    wins_M = [
        np.mean((x_R[:, None] > y_R[None, :]) + 0.5 * (x_R[:, None] == y_R[None, :]))
        for x_R, y_R in zip(x_tasks, y_tasks, strict=True)
    ]
    return float(np.mean(wins_M))


def student_t_cdf(t: float, df: int) -> float:
    """P(T ≤ t) of Student's t with a whole number of degrees of freedom, as the finite sum over θ = atan(t/√df).

    Source: Abramowitz & Stegun 1964, 26.7.3 (odd df) and 26.7.4 (even df).

    Raises:
        ValueError: df below 1.
    """
    if df < 1:
        raise ValueError(f"df={df}: degrees of freedom must be at least 1")
    theta = math.atan2(t, math.sqrt(df))
    cos_sq = math.cos(theta) ** 2
    term, total = 1.0, 0.0
    if df % 2 == 0:
        for k in range(df // 2):
            total += term
            term *= cos_sq * (2 * k + 1) / (2 * k + 2)
        return 0.5 + 0.5 * math.sin(theta) * total
    for k in range((df - 1) // 2):
        total += term
        term *= cos_sq * (2 * k + 2) / (2 * k + 3)
    return 0.5 + (theta + math.sin(theta) * math.cos(theta) * total) / math.pi


def student_t_quantile(probability: float, df: int) -> float:
    """The t with P(T ≤ t) = probability, by bisection of `student_t_cdf`, to about 1e-12 relative.

    Raises:
        ValueError: probability outside (0, 1), or df below 1.
    """
    _check_level(probability)
    if probability < 0.5:
        return -student_t_quantile(1.0 - probability, df)
    high = 1.0
    while student_t_cdf(high, df) < probability:
        high *= 2.0
    low = 0.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if student_t_cdf(middle, df) < probability else (low, middle)
    return 0.5 * (low + high)


def t_interval(scores_R: Float[np.ndarray, " R"], *, level: float = 0.95) -> Interval:
    """Student's interval of the mean of R independent runs, mean ± t_{R−1} · s/√R; `NO_INTERVAL` with one run.

    It assumes about normal scores and, unlike the percentile bootstrap, keeps its coverage with very few runs.
    """
    (scores_R,) = _tasks([scores_R])
    _check_level(level)
    if scores_R.size < 2:
        return NO_INTERVAL
    half = student_t_quantile(0.5 + level / 2.0, scores_R.size - 1) * scores_R.std(ddof=1) / math.sqrt(scores_R.size)
    return Interval(float(scores_R.mean() - half), float(scores_R.mean() + half))


def wilson_interval(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927): it stays in [0, 1] and has width at 0 and at n successes.

    Raises:
        ValueError: no trials, successes outside [0, trials], or a level outside (0, 1).
    """
    _check_level(level)
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes={successes}, trials={trials}: need trials ≥ 1 and 0 ≤ successes ≤ trials")
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    share = successes / trials
    scale = 1.0 + z**2 / trials
    centre = (share + z**2 / (2.0 * trials)) / scale
    half = z / scale * math.sqrt(share * (1.0 - share) / trials + z**2 / (4.0 * trials**2))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def normalise(score: float, random: float, optimal: float) -> float:
    """(score − random) / (optimal − random): 0 is the random player, 1 the optimal one.

    Raises:
        ValueError: both ends equal, which leaves no scale.
    """
    if optimal == random:
        raise ValueError(f"random={random} and optimal={optimal}: equal ends leave no scale to normalise by")
    return (score - random) / (optimal - random)
