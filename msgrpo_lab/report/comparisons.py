"""Two methods, or one method at many thresholds: intervals and tests from few runs, as pure functions of arrays.

Axes as in `msgrpo_lab.intervals`: R runs (seeds) of one task, M tasks (scenarios), X thresholds, B bootstrap resamples.
Every random draw comes from the caller's generator.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from msgrpo_lab.intervals import NO_INTERVAL, Interval, performance_profile, probability_of_improvement
from msgrpo_lab.report.curves import BOOTSTRAP_SEED, curve, interval_at, last_values, panels

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


log = logging.getLogger(__name__)


def normalised_scores(points: pd.DataFrame) -> pd.DataFrame:
    """Every cell's normalised score, sampled play, before the first and after the last update.

    Returns:
        Columns env, scenario, method, seeds, first_step, last_step, start, end, low, high (95 % interval of the end),
        interval (what it is over). Scenarios without reference players have no normalised score and no row.
    """
    rows = []
    for env, scenario in panels(points):
        frame = curve(points, env, f"eval/{scenario}/normalised_score")
        if frame.empty:
            log.warning("%s: no normalised score is logged for %s", env, scenario)
        for method, line in frame.groupby("method", sort=False):
            first, last = line.iloc[0].to_dict(), line.iloc[-1].to_dict()
            (low, high), interval = interval_at(points, last)
            rows.append(
                {
                    "env": env,
                    "scenario": scenario,
                    "method": str(method),
                    "seeds": last["seeds"],
                    "first_step": first["step"],
                    "last_step": last["step"],
                    "start": first["mean"],
                    "end": last["mean"],
                    "low": low,
                    "high": high,
                    "interval": interval,
                }
            )
    return pd.DataFrame(rows)


def profiles(points: pd.DataFrame) -> pd.DataFrame:
    """Performance profiles of the methods over the environments that all of them have, on their own episodes.

    Returns:
        Columns method, threshold, share, low, high (pointwise 95 % bootstrap band, nan with a single run somewhere),
        tasks and runs (numbers of); empty where no method has two runs of an environment, or none is shared.
    """
    scores: dict[str, dict[str, np.ndarray]] = {}
    for env in points["env"].unique():
        for method in points.loc[points["env"] == env, "method"].unique():
            values = last_values(points, env, method, f"eval/{env}/normalised_score")["value"].dropna()
            if len(values):
                scores.setdefault(str(method), {})[str(env)] = values.to_numpy(dtype=np.float64)
    if not scores or all(len(runs_R) < 2 for tasks in scores.values() for runs_R in tasks.values()):
        return pd.DataFrame()
    shared = [env for env in points["env"].unique() if all(env in tasks for tasks in scores.values())]
    if not shared:
        log.warning("performance profile: left out, the methods have no environment in common")
        return pd.DataFrame()
    values_N = np.concatenate([tasks[env] for tasks in scores.values() for env in shared])
    # a profile falls at the scores themselves and nowhere else
    threshold_X = np.unique([min(0.0, float(values_N.min()) - 0.02), *values_N, max(1.0, float(values_N.max()))])
    frames = []
    for method, tasks in scores.items():
        scores_MR = [tasks[env] for env in shared]
        low_X, high_X = profile_band(scores_MR, threshold_X, np.random.default_rng(BOOTSTRAP_SEED))
        frame = pd.DataFrame({"method": method, "threshold": threshold_X})
        frame["share"] = performance_profile(scores_MR, threshold_X)
        frame["low"], frame["high"] = low_X, high_X
        frame["tasks"], frame["runs"] = len(shared), sum(len(scores_R) for scores_R in scores_MR)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)
