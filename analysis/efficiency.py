"""What a score has cost: updates, tokens trained on, environment steps, time. One function a figure."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from analysis.cells import score_metric
from analysis.curves import curve
from analysis.looks import (
    SCORE_LABELS,
    SHARES,
    Drawing,
    band_handles,
    draw_line,
    env_title,
    envs_of,
    mark_empty,
    method_handles,
    set_limits,
    styles_of,
)
from analysis.panels import Sheet

log = logging.getLogger("analysis.efficiency")

UPDATES = "updates"
TOKENS, STEPS, TIME = "train/trained_tokens", "train/env_steps", "train/wall_s"
COSTS = (UPDATES, TOKENS, STEPS, TIME)
UNITS: dict[str, list[tuple[float, str]]] = {
    UPDATES: [(1.0, "optimiser updates")],
    TOKENS: [(1e6, "tokens trained on [millions]"), (1e3, "tokens trained on [thousands]"), (1.0, "tokens trained on")],
    STEPS: [
        (1e6, "environment steps [millions]"),
        (1e3, "environment steps [thousands]"),
        (1.0, "environment steps"),
    ],
    TIME: [(3600.0, "training time [h]"), (60.0, "training time [min]"), (1.0, "training time [s]")],
}
"""Cost → divisors and axis labels, largest first."""


def spent_before(run: pd.DataFrame, cost: str, updates_V: Int[np.ndarray, " V"]) -> Float[np.ndarray, " V"]:
    """What a run had spent in all when it had made so many updates; nan where it did not log `cost`.

    What update u logs stands at step u − 1, so after u updates it is the value at the last step below u; before any, 0.

    Args:
        run: points of one run, with columns metric, step and value.
        cost: a metric that counts up, or "updates".
        updates_V: numbers of updates.
    """
    if cost == UPDATES:
        return np.asarray(updates_V, dtype=np.float64)
    logged = run[run["metric"] == cost].sort_values("step")
    if logged.empty:
        return np.full(len(updates_V), np.nan)
    place_V = np.searchsorted(logged["step"].to_numpy(), updates_V, side="left")
    spent_V: Float[np.ndarray, " V"] = np.concatenate([[0.0], logged["value"].to_numpy(dtype=np.float64)])[place_V]
    return spent_V


def priced(points: pd.DataFrame, env: str, cost: str) -> pd.DataFrame:
    """The environment's own held-out score, sampled play, with its cost: columns of `curve`, and x (mean over runs).

    A method that has a run without the cost has no rows.
    """
    frame = curve(points, env, f"eval/{env}/{score_metric(env)}")
    parts = []
    for method, line in frame.groupby("method", sort=False):
        cell = points[(points["env"] == env) & (points["method"] == method)]
        spent = [spent_before(run, cost, line["step"].to_numpy()) for _, run in cell.groupby("run_id", sort=False)]
        parts.append(line.assign(x=np.mean(spent, axis=0)))
    table = pd.concat(parts, ignore_index=True) if parts else frame.assign(x=np.nan)
    return table.dropna(subset=["x"]).assign(cost=cost)


def efficiency(points: pd.DataFrame) -> Drawing | None:
    """Held-out sampled score against what it has cost: updates, tokens trained on, environment steps, training time.

    Training time is that of rollouts and updates, without evaluation.
    """
    logged = set(points["metric"])
    for cost in sorted(set(COSTS) - {UPDATES} - logged):
        log.warning("efficiency: no job logged %s", cost)
    costs = [cost for cost in COSTS if cost == UPDATES or cost in logged]
    envs = [env for env in envs_of(points) if not priced(points, env, UPDATES).empty]
    if not envs:
        log.warning("efficiency: left out, no job logged a held-out score")
        return None
    style = styles_of(points)
    sheet = Sheet([env_title(env) for env in envs], rows=len(costs), plot_height=1.35)
    tables = []
    for place, cost in enumerate(costs):
        frames = {env: priced(points, env, cost) for env in envs}
        largest = max((float(frame["x"].max()) for frame in frames.values() if len(frame)), default=0.0)
        divisor, unit = next((unit for unit in UNITS[cost] if largest >= 3 * unit[0]), UNITS[cost][-1])
        for column, (env, frame) in enumerate(frames.items()):
            part = frame.assign(x=frame["x"] / divisor, x_unit=unit)
            axes, score = sheet.axes(column, place), score_metric(env)
            for method, line in part.groupby("method", sort=False):
                draw_line(axes, line, style[str(method)], x="x")
            if part.empty:
                mark_empty(axes)
            set_limits(axes, part[["mean", "low", "high"]], share=score in SHARES)
            axes.set(xlabel=unit, ylabel=SCORE_LABELS[score], xlim=(0, None))
            tables.append(part)
    data = pd.concat(tables, ignore_index=True)
    sheet.legend([*method_handles(style, data), *band_handles(data)])
    return Drawing(sheet.finish(), data)
