"""What a sampler changes: every method beside its counterpart with uniform drawing, at equal updates and equal tokens.

Runs are paired by seed: equal seeds begin with the same adapter and meet the same initial states.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.cells import score_metric
from analysis.comparisons import improvement_interval, sign_test
from analysis.curves import BOOTSTRAP_SEED, MODES
from analysis.efficiency import TOKENS, spent_before
from analysis.stats import mean_of_means, probability_of_improvement, stratified_bootstrap, t_interval

log = logging.getLogger("analysis.ablation")

BASE_SAMPLER = "uniform"
AT_UPDATES = "equal updates"
AT_TOKENS = "equal trained tokens"
BUDGETS = (AT_UPDATES, AT_TOKENS)
NORMALISED = "normalised_score"
ALL = "all scenarios"
STUDENT = "Student's t over paired seeds"
BOOTSTRAP = "bootstrap over paired seeds within scenarios"


def counterparts(points: pd.DataFrame, env: str) -> list[tuple[str, str]]:
    """(method, the same with uniform drawing) for every method of the environment that has such a counterpart."""
    methods = [str(method) for method in points.loc[points["env"] == env, "method"].unique()]
    pairs = []
    for method in methods:
        sampler, comma, rest = method.partition(", ")
        base = BASE_SAMPLER + comma + rest
        if sampler != BASE_SAMPLER and base in methods:
            pairs.append((method, base))
    return pairs


def run_scores(points: pd.DataFrame, env: str, method: str, metric: str) -> dict[str, pd.DataFrame]:
    """Seed → a run's held-out scores: columns updates, score, tokens (trained on before it; nan where not logged)."""
    cell = points[(points["env"] == env) & (points["method"] == method)]
    found = {}
    for seed, run in cell.groupby("seed", sort=False):
        scores = run[run["metric"] == metric].sort_values("step")
        if scores.empty:
            continue
        updates_V = scores["step"].to_numpy()
        tokens_V = spent_before(run, TOKENS, updates_V)
        found[str(seed)] = pd.DataFrame({"updates": updates_V, "score": scores["value"].to_numpy(), "tokens": tokens_V})
    return found


def _at_updates(runs: list[pd.DataFrame]) -> tuple[float, list[float]] | None:
    """The last number of updates at which every run was evaluated, and the scores there."""
    shared = set.intersection(*(set(run["updates"]) for run in runs))
    if not shared:
        return None
    at = max(shared)
    return float(at), [float(run.loc[run["updates"] == at, "score"].iloc[0]) for run in runs]


def _at_tokens(runs: list[pd.DataFrame]) -> tuple[float, list[float]] | None:
    """The tokens that every run has trained on, and the scores there, linear between two evaluations."""
    if any(run["tokens"].isna().any() for run in runs):
        return None
    at = min(float(run["tokens"].iloc[-1]) for run in runs)
    return at, [float(np.interp(at, run["tokens"], run["score"])) for run in runs]


def _pairs(points: pd.DataFrame, env: str, method: str, base: str, metric: str, budget: str) -> pd.DataFrame | None:
    """One row a seed that both have: columns seed, at, x (the method's score), y (its counterpart's)."""
    x_runs, y_runs = (run_scores(points, env, name, metric) for name in (method, base))
    seeds = [seed for seed in x_runs if seed in y_runs]
    if len(seeds) < max(len(x_runs), len(y_runs)):
        log.warning("%s: %s and %s are compared on the %d seeds that both have", env, method, base, len(seeds))
    if not seeds:
        return None
    runs = [x_runs[seed] for seed in seeds] + [y_runs[seed] for seed in seeds]
    found = (_at_updates if budget == AT_UPDATES else _at_tokens)(runs)
    if found is None:
        log.warning("%s: %s and %s are not compared at %s: not logged", env, method, base, budget)
        return None
    at, scores = found
    return pd.DataFrame({"seed": seeds, "at": at, "x": scores[: len(seeds)], "y": scores[len(seeds) :]})


def _row(tasks: list[pd.DataFrame], **names: str) -> Mapping[str, Any]:
    """One comparison, over the pairs of one task or of several."""
    x_MR, y_MR = ([pairs[name].to_numpy(dtype=np.float64) for pairs in tasks] for name in ("x", "y"))
    gain_MR = [x_R - y_R for x_R, y_R in zip(x_MR, y_MR, strict=True)]
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    single = len(tasks) == 1
    low, high = t_interval(gain_MR[0]) if single else stratified_bootstrap(gain_MR, mean_of_means, rng)
    better_low, better_high = improvement_interval(x_MR, y_MR, rng)
    gains_N = np.concatenate(gain_MR)
    return {
        **names,
        "at": float(tasks[0]["at"].iloc[0]) if single else math.nan,
        "pairs": gains_N.size,
        "mean": mean_of_means(x_MR),
        "base_mean": mean_of_means(y_MR),
        "difference": mean_of_means(gain_MR),
        "low": low,
        "high": high,
        "interval": STUDENT if single else BOOTSTRAP,
        "better": probability_of_improvement(x_MR, y_MR),
        "better_low": better_low,
        "better_high": better_high,
        "wins": int((gains_N > 0).sum()),
        "losses": int((gains_N < 0).sum()),
        "sign_p": sign_test(gains_N),
    }


def ablation(points: pd.DataFrame) -> pd.DataFrame:
    """Every method beside its counterpart with uniform drawing, on the environments' own held-out episodes.

    Returns:
        One row a (env or "all scenarios", method, mode, score, budget): columns env, method, base, mode (sampled or
        greedy), score (normalised_score, or the scenario's own), budget, at (updates or tokens compared at; nan over
        scenarios), pairs, mean, base_mean, difference with 95 % interval (low, high) and what that is (interval),
        better (probability of improvement) with 95 % bootstrap interval, wins, losses and sign_p over pairs.
        Intervals are nan with a single pair. Over scenarios there are normalised scores only.
    """
    rows = []
    tasks: dict[tuple[str, str, str, str], dict[str, pd.DataFrame]] = {}
    for env in points["env"].unique():
        for method, base in counterparts(points, env):
            for mode, prefix in MODES.items():
                for score in (NORMALISED, score_metric(env)):
                    for budget in BUDGETS:
                        pairs = _pairs(points, env, method, base, f"eval/{env}/{prefix}{score}", budget)
                        if pairs is None:
                            continue
                        names = {"method": method, "base": base, "mode": mode, "score": score, "budget": budget}
                        rows.append(_row([pairs], env=env, **names))
                        if score == NORMALISED:
                            tasks.setdefault((method, base, mode, budget), {})[env] = pairs
    for (method, base, mode, budget), by_env in tasks.items():
        if len(by_env) > 1:
            names = {"method": method, "base": base, "mode": mode, "score": NORMALISED, "budget": budget}
            rows.append(_row(list(by_env.values()), env=ALL, **names))
    return pd.DataFrame(rows)
