"""Which runs belong together: a cell is one (environment, method), and its runs differ in the seed alone.

A method is the sampler, plus whatever else differs between the jobs (credit rule, model, prompt, any logged parameter),
so that two settings are never averaged as if they were two seeds.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from msgrpo_lab.intervals import Interval, mean_of_means, stratified_bootstrap

log = logging.getLogger(__name__)

SAMPLER_ORDER = ("uniform", "abs_adv")
ENV_ORDER = (
    "frozenlake",
    "frozenlake_slippery",
    "frozenlake_big",
    "snake",
    "snake_20",
    "snake_poison",
    "snake_poison_banana",
)
IDENTITY = re.compile(
    r"^param\.(paths|logger|callbacks|checkpoint)\.|(^|[._])(seed|run_id|run_name|dir|ckpt_path|resume|job_num|job_id)$"
)
"""Parameters that tell two runs of one setting apart, and are no setting themselves."""


def score_metric(scenario: str) -> str:
    """The score a scenario is judged by: success on Frozen Lake, whose only reward is success; else the return."""
    return "success_rate" if scenario.startswith("frozenlake") else "return_mean"


def rank(name: str, order: Sequence[str]) -> tuple[int, str]:
    """Sort key: the known names in their order, then the others by name."""
    return (order.index(name) if name in order else len(order), name)


def label_methods(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with a column `method`, ordered by environment, method and seed, one run a (env, method, seed).

    A seed that occurs twice in a cell is one run, not two: the newer is kept, and a warning names the other.
    """
    runs = runs.reset_index(drop=True)
    shown = [tag for tag in ("credit", "model", "prompt") if runs[tag].nunique() > 1]
    cells = runs.groupby(["env", "sampler", "credit", "model", "prompt"], sort=False)
    params = [column for column in runs.columns if column.startswith("param.") and not IDENTITY.search(column)]
    shown += [column for column in params if (cells[column].nunique() > 1).any()]
    method = runs["sampler"].astype(str)
    for column in shown:
        name = column.removeprefix("param.")
        value = runs[column].astype(str)
        method = method + ", " + (f"{name}=" + value if column.startswith("param.") else value)
    runs = runs.assign(method=method)
    keyed = runs.assign(seed_key=runs["seed"].where(runs["seed"] != "", runs["run_id"])).sort_values(
        "start", kind="stable"
    )
    twice = keyed.duplicated(["env", "method", "seed_key"], keep="last")
    for row in keyed[twice].itertuples():
        log.warning(
            "left out: job %s (%s, %s) has seed %s, as a newer job does", row.name, row.env, row.method, row.seed
        )
    keyed = keyed[~twice].drop(columns="seed_key")
    order = sorted(
        keyed.index,
        key=lambda i: (
            rank(str(keyed.at[i, "env"]), ENV_ORDER),
            rank(str(keyed.at[i, "sampler"]), SAMPLER_ORDER),
            str(keyed.at[i, "method"]),
            str(keyed.at[i, "seed"]).zfill(9),
        ),
    )
    return keyed.loc[order].reset_index(drop=True)


def join(runs: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """Every number with its run's env, method and seed: columns run_id, env, method, seed, metric, step, value."""
    return runs[["run_id", "env", "method", "seed"]].merge(
        metrics[["run_id", "metric", "step", "value"]], on="run_id", how="inner", sort=False
    )


def panels(points: pd.DataFrame) -> list[tuple[str, str]]:
    """The (env, scenario) pairs with held-out scores, the environment's own scenario before the others."""
    found: list[tuple[str, str]] = []
    for env in points["env"].unique():
        names = points.loc[points["env"] == env, "metric"].str.extract(r"^eval/([^/]+)/")[0].dropna().unique()
        found += [(env, scenario) for scenario in sorted(names, key=lambda s: (s != env, *rank(s, ENV_ORDER)))]
    return found


OVER_SEEDS = "std over seeds"
OVER_RUNS = "95 % over seeds"
OVER_EPISODES = "95 % over episodes"
OVER_GROUPS = "95 % over groups"
NONE = "none"
MODES = {"sampled": "", "greedy": "greedy_"}
BOOTSTRAP_SEED = 20250810

CURVE = {
    "env": "str",
    "method": "str",
    "metric": "str",
    "step": "int64",
    "seeds": "int64",
    "mean": "float64",
    "low": "float64",
    "high": "float64",
    "band": "str",
}
"""Columns of a curve and their types, kept by empty ones so that putting curves together changes none."""


def _pivot(points: pd.DataFrame, env: str, method: str, metric: str) -> pd.DataFrame:
    """Step × run table of the steps that every run of the cell has logged; empty where no run logged the metric."""
    logged = points[points["metric"] == metric]
    cell = logged[(logged["env"] == env) & (logged["method"] == method)]
    if cell.empty:
        return pd.DataFrame()
    table = cell.pivot(index="step", columns="run_id", values="value").sort_index()
    shared = table[cell.groupby("step").size().reindex(table.index) == table.shape[1]]
    without = points.loc[(points["env"] == env) & (points["method"] == method), "run_id"].nunique() - table.shape[1]
    if without:
        log.warning("%s, %s: %d of the runs logged no %s and are left out of it", env, method, without, metric)
    if len(shared) < len(table):
        log.warning("%s, %s: %s is shown at the %d steps shared by all seeds", env, method, metric, len(shared))
    return shared


def _methods(points: pd.DataFrame, env: str) -> list[str]:
    return [str(method) for method in points.loc[points["env"] == env, "method"].unique()]


def curve(points: pd.DataFrame, env: str, metric: str) -> pd.DataFrame:
    """One metric of one environment over the updates, a line a method.

    Returns:
        Columns env, method, metric, step, seeds, mean, low, high, band. With two seeds or more the band is mean ± one
        sample standard deviation over seeds; with one it is the logged 95 % interval over evaluation episodes where
        there is one (`<metric>_low`, `<metric>_high`), and nan where there is none.
    """
    frames = []
    for method in _methods(points, env):
        table = _pivot(points, env, method, metric)
        if table.empty:
            continue
        frame = pd.DataFrame({"env": env, "method": method, "metric": metric, "step": table.index})
        frame["seeds"] = table.shape[1]
        frame["mean"] = table.mean(axis=1, skipna=False).to_numpy()
        if table.shape[1] > 1:
            std = table.std(axis=1, ddof=1, skipna=False).to_numpy()
            frame["low"], frame["high"], frame["band"] = frame["mean"] - std, frame["mean"] + std, OVER_SEEDS
        else:
            ends = [
                _pivot(points, env, method, f"{metric}_{end}").reindex(table.index).mean(axis=1, skipna=False)
                for end in ("low", "high")
            ]
            frame["low"], frame["high"] = ends[0].to_numpy(), ends[1].to_numpy()
            frame["band"] = OVER_EPISODES if frame[["low", "high"]].notna().all(axis=1).any() else NONE
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(CURVE)).astype(CURVE)


def references(points: pd.DataFrame, env: str, scenario: str, metric: str) -> pd.DataFrame:
    """Scores of the reference players of a scenario: columns env, scenario, player, metric, value, lowest first."""
    pattern = rf"^reference/{re.escape(scenario)}/([^/]+)/{re.escape(metric)}$"
    mine = points[points["env"] == env]
    mine = mine.assign(player=mine["metric"].str.extract(pattern)[0]).dropna(subset=["player"])
    mine = mine.sort_values("step", kind="stable").drop_duplicates(["run_id", "player"], keep="last")
    rows = []
    for player, cell in mine.groupby("player", sort=True):
        low, high = cell["value"].min(), cell["value"].max()
        if high - low > 1e-6:
            log.warning(
                "%s: reference %s differs between jobs (%.4g to %.4g); its mean is used", env, player, low, high
            )
        rows.append((env, scenario, player, metric, cell["value"].mean()))
    table = pd.DataFrame(rows, columns=["env", "scenario", "player", "metric", "value"])
    return table.sort_values(["value", "player"], kind="stable").reset_index(drop=True)


def _last_means(points: pd.DataFrame, env: str, metric: str) -> dict[str, float]:
    """Method → mean over seeds at the last shared step."""
    frame = curve(points, env, metric)
    return {str(method): float(line["mean"].iloc[-1]) for method, line in frame.groupby("method", sort=False)}


def interval_at(points: pd.DataFrame, row: Mapping[Hashable, Any]) -> tuple[Interval, str]:
    """95 % interval of one row of `curve`, and what it is over: seeds by bootstrap, or episodes as logged."""
    if row["seeds"] < 2:
        return Interval(row["low"], row["high"]), row["band"]
    table = _pivot(points, row["env"], row["method"], row["metric"])
    scores_R = table.loc[row["step"]].to_numpy(dtype=np.float64)
    return stratified_bootstrap([scores_R], mean_of_means, np.random.default_rng(BOOTSTRAP_SEED)), OVER_RUNS


def summary(points: pd.DataFrame) -> pd.DataFrame:
    """Where every cell began and ended on held-out episodes, one row a (env, scenario, method, mode).

    Returns:
        Columns env, scenario, method, mode (sampled or greedy), metric, seeds, first_step, last_step, start, start_low,
        start_high, end, end_low, end_high, interval (what the two intervals are over), normalised (end), env_steps and
        wall_s (means over seeds at the last update; nan where not logged).
    """
    rows = []
    for env, scenario in panels(points):
        env_steps, wall_s = (_last_means(points, env, f"train/{name}") for name in ("env_steps", "wall_s"))
        for mode, prefix in MODES.items():
            normalised = _last_means(points, env, f"eval/{scenario}/{prefix}normalised_score")
            frame = curve(points, env, f"eval/{scenario}/{prefix}{score_metric(scenario)}")
            for method, line in frame.groupby("method", sort=False):
                first, last = line.iloc[0].to_dict(), line.iloc[-1].to_dict()
                (start_low, start_high), _ = interval_at(points, first)
                (end_low, end_high), interval = interval_at(points, last)
                row = {
                    "env": env,
                    "scenario": scenario,
                    "method": str(method),
                    "mode": mode,
                    "metric": last["metric"],
                    "seeds": last["seeds"],
                    "first_step": first["step"],
                    "last_step": last["step"],
                    "start": first["mean"],
                    "start_low": start_low,
                    "start_high": start_high,
                    "end": last["mean"],
                    "end_low": end_low,
                    "end_high": end_high,
                    "interval": interval,
                    "normalised": normalised.get(str(method), math.nan),
                    "env_steps": env_steps.get(str(method), math.nan),
                    "wall_s": wall_s.get(str(method), math.nan),
                }
                rows.append(row)
    return pd.DataFrame(rows)


def last_values(points: pd.DataFrame, env: str, method: str, metric: str) -> pd.DataFrame:
    """Each run's value at the cell's last shared step: columns run_id, seed, step, value."""
    table = _pivot(points, env, method, metric)
    if table.empty:
        return pd.DataFrame(columns=["run_id", "seed", "step", "value"])
    step = table.index[-1]
    in_cell = (points["env"] == env) & (points["method"] == method) & (points["metric"] == metric)
    chosen: pd.DataFrame = points.loc[in_cell & (points["step"] == step), ["run_id", "seed", "step", "value"]]
    return chosen.reset_index(drop=True)


def best_run(points: pd.DataFrame, env: str, method: str, metric: str) -> pd.DataFrame:
    """The cell's single best run: highest at the last shared step, then on average over the steps, then first in order.

    Returns:
        Columns step, run_id, seed, value; empty where the cell has a single run, which its mean shows already.
    """
    table = _pivot(points, env, method, metric)
    if table.shape[1] < 2 or table.empty:
        return pd.DataFrame(columns=["step", "run_id", "seed", "value"])
    started = list(points.loc[points["run_id"].isin(table.columns), "run_id"].unique())
    ends, means = table.iloc[-1], table.mean()
    best = min(table.columns, key=lambda run_id: (-ends[run_id], -means[run_id], started.index(run_id)))
    seed = points.loc[points["run_id"] == best, "seed"].iloc[0]
    return pd.DataFrame({"step": table.index, "run_id": best, "seed": seed, "value": table[best].to_numpy()})
