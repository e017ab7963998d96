"""What goes on inside training: entropies, groups without spread, the sampler's bias, and how true the credit is.

One function a figure, as in `analysis.figures`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.lines import Line2D

from analysis.sheet import Sheet
from analysis.style import (
    GREY,
    SCORE_LABELS,
    SHARES,
    UPDATES,
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
from msgrpo_lab.report.curves import OVER_EPISODES, OVER_GROUPS, curve, score_metric

log = logging.getLogger("analysis.training_figures")

Rows = Mapping[str, Mapping[str, str]]
"""Rows of a figure: axis label → metrics and their line styles."""
TOKEN_ENTROPY, ACTION_ENTROPY = "train/token_entropy", "train/action_entropy"
ENTROPY = "entropy [nats]"
DIAGNOSTICS: Rows = {
    ENTROPY: {TOKEN_ENTROPY: "-", ACTION_ENTROPY: "--"},
    "zero-spread groups": {"train/zero_std_groups": "-"},
    "ESS / pool size": {"sampler/ess": "-"},
    "inclusion bias [adv.]": {"sampler/inclusion_bias": "-"},
}
FIDELITY: Rows = {
    "gradient cosine": {"credit/gradient_cosine": "-", "credit/drawn_gradient_cosine": "--"},
    "rank correlation": {"credit/spearman": "-", "credit/drawn_spearman": "--"},
    "sign agreement": {"credit/sign_agreement": "-", "credit/drawn_sign_agreement": "--"},
}
"""Of the run's own credit rule with the exact advantages: all episodes, and those that the sampler drew."""


def diagnostics(points: pd.DataFrame) -> Drawing | None:
    """What may go wrong while the return still rises: entropies, groups without spread, and the sampler's bias."""
    logged = set(points["metric"])
    for metrics in DIAGNOSTICS.values():
        for metric in sorted(metrics.keys() - logged):
            log.warning("diagnostics: no job logged %s", metric)
    rows = {label: metrics for label, metrics in DIAGNOSTICS.items() if metrics.keys() & logged}
    if not rows:
        log.warning("diagnostics: left out, nothing to show")
        return None
    sheet, data = _rows_of_curves(points, envs_of(points), rows)
    entropies = [
        Line2D([], [], color=GREY, ls=dashes, label=metric.removeprefix("train/").replace("_", " "))
        for metric, dashes in DIAGNOSTICS[ENTROPY].items()
        if metric in logged
    ]
    sheet.legend([*method_handles(styles_of(points), data), *entropies, *band_handles(data)])
    return Drawing(sheet.finish(), data)


def credit_fidelity(points: pd.DataFrame) -> Drawing | None:
    """How well credit follows the exact advantages over training; environments without an oracle are left out.

    Solid lines are of all episodes, dashed ones of those that the sampler drew.
    """
    measured = points[points["metric"].isin([metric for metrics in FIDELITY.values() for metric in metrics])]
    if measured.empty:
        log.warning("credit fidelity: left out, not measured; train with callbacks.fidelity.every=<epochs>")
        return None
    logged = set(measured["metric"])
    rows = {label: metrics for label, metrics in FIDELITY.items() if metrics.keys() & logged}
    sheet, data = _rows_of_curves(points, envs_of(measured), rows)
    # what the meter logs for a single run is an interval over the groups of that rollout
    data["band"] = data["band"].replace(OVER_EPISODES, OVER_GROUPS)
    kinds = [
        Line2D([], [], color=GREY, ls="-", label="all episodes"),
        Line2D([], [], color=GREY, ls="--", label="drawn episodes"),
    ]
    sheet.legend([*method_handles(styles_of(points), data), *kinds, *band_handles(data)])
    return Drawing(sheet.finish(), data)


def _rows_of_curves(points: pd.DataFrame, envs: list[str], rows: Rows) -> tuple[Sheet, pd.DataFrame]:
    """A column of panels an environment, a panel a row of metrics against updates."""
    style = styles_of(points)
    sheet = Sheet([env_title(env) for env in envs], rows=len(rows), plot_height=1.15, between=0.26)
    tables = []
    for column, env in enumerate(envs):
        for place, (label, metrics) in enumerate(rows.items()):
            axes = sheet.axes(column, place)
            frames = [curve(points, env, metric) for metric in metrics]
            for frame, dashes in zip(frames, metrics.values(), strict=True):
                for method, line in frame.groupby("method", sort=False):
                    draw_line(axes, line, style[str(method)], dashes=dashes)
            part = pd.concat(frames, ignore_index=True)
            if part.empty:
                mark_empty(axes)
            set_limits(axes, part[["mean", "low", "high"]], share=label in SHARES)
            if label == ENTROPY:
                axes.set_ylim(bottom=0.0)
            axes.set(ylabel=label, xlabel=UPDATES if place == len(rows) - 1 else "")
            tables.append(part)
    return sheet, pd.concat(tables, ignore_index=True)


def entropies(points: pd.DataFrame) -> Drawing | None:
    """Action entropy against token entropy, the way a policy goes from its first update (open) to its last (filled).

    Thick lines are means over runs, thin ones single runs. On the diagonal a turn's action is as uncertain as a token.
    """
    both = points[points["metric"].isin([TOKEN_ENTROPY, ACTION_ENTROPY])]
    keys = ["run_id", "env", "method", "seed", "step"]
    paired = both.pivot(index=keys, columns="metric", values="value").reindex(columns=[TOKEN_ENTROPY, ACTION_ENTROPY])
    runs = paired.dropna().reset_index().rename(columns={TOKEN_ENTROPY: "token", ACTION_ENTROPY: "action"})
    if runs.empty:
        log.warning("entropies: left out, no job logged both %s and %s", TOKEN_ENTROPY, ACTION_ENTROPY)
        return None
    style, envs = styles_of(points), [env for env in envs_of(points) if env in set(runs["env"])]
    sheet = Sheet([env_title(env) for env in envs])
    tables = []
    for column, env in enumerate(envs):
        axes, mine = sheet.axes(column), runs[runs["env"] == env]
        top = 1.06 * float(mine[["token", "action"]].to_numpy().max())
        axes.plot([0, top], [0, top], color="#bbbbbb", lw=0.7, zorder=1)
        for method, cell in mine.groupby("method", sort=False):
            look = style[str(method)]
            for _, run in cell.groupby("run_id", sort=False):
                axes.plot(run["token"], run["action"], color=look.colour, lw=0.5, alpha=0.3, zorder=1.5)
            seeds = cell["run_id"].nunique()
            shared = cell[cell.groupby("step")["run_id"].transform("size") == seeds]
            line = shared.groupby("step", as_index=False)[["token", "action"]].mean()
            axes.plot(line["token"], line["action"], color=look.colour, ls=look.dashes)
            for place, fill in ((0, "white"), (-1, look.colour)):
                axes.plot(*line.iloc[place][["token", "action"]], look.marker, color=look.colour, mfc=fill, zorder=3)
            tables += [line.assign(env=env, method=method, seeds=seeds, kind="mean"), cell.assign(kind="run")]
        axes.set(xlabel="token entropy [nats]", ylabel="action entropy [nats]", xlim=(0, top), ylim=(0, top))
    data = pd.concat(tables, ignore_index=True)
    ends = [
        Line2D([], [], color=GREY, ls="", marker="o", mfc=fill, label=label)
        for fill, label in (("white", "first update"), (GREY, "last update"))
    ]
    thin = Line2D([], [], color=GREY, lw=0.5, alpha=0.5, label="single runs")
    several = bool((data["seeds"].dropna() > 1).any())
    sheet.legend([*method_handles(style, data), *ends, *([thin] if several else [])])
    return Drawing(sheet.finish(), data)


BY_UPDATES = "updates"
TOKENS, STEPS, TIME = "train/trained_tokens", "train/env_steps", "train/wall_s"
COSTS = (BY_UPDATES, TOKENS, STEPS, TIME)
UNITS: dict[str, list[tuple[float, str]]] = {
    BY_UPDATES: [(1.0, "optimiser updates")],
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
    if cost == BY_UPDATES:
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
    for cost in sorted(set(COSTS) - {BY_UPDATES} - logged):
        log.warning("efficiency: no job logged %s", cost)
    costs = [cost for cost in COSTS if cost == BY_UPDATES or cost in logged]
    envs = [env for env in envs_of(points) if not priced(points, env, BY_UPDATES).empty]
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
