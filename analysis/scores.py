"""Held-out scores on the scale from random play (0) to the upper reference player (1), at the last update."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd

from analysis.cells import panels
from analysis.comparisons import profile_band
from analysis.curves import BOOTSTRAP_SEED, curve, interval_at, last_values
from msgrpo_lab.intervals import performance_profile

log = logging.getLogger("analysis.scores")


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
