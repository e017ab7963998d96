"""One function a figure: tidy points in, a drawing and the very numbers it shows out.

`points` is the table of `analysis.curves.join`. A figure with nothing to show is None; a warning says what is missing.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.curves import curve, last_values, panels, references, score_metric, summary
from analysis.looks import (
    Look,
    band_handles,
    draw_line,
    draw_references,
    env_title,
    looks,
    mark_empty,
    method_handles,
    method_label,
    mode_handles,
    scenario_title,
    set_limits,
)
from analysis.panels import Sheet

log = logging.getLogger("analysis.figures")

UPDATES = "optimiser updates"
SCORE_LABELS = {"success_rate": "held-out success rate", "return_mean": "held-out return"}
RETURN = "train/return_mean"
ENTROPY = "entropy [nats]"
DIAGNOSTICS: dict[str, dict[str, str]] = {
    ENTROPY: {"train/token_entropy": "-", "train/action_entropy": "--"},
    "zero-spread groups": {"train/zero_std_groups": "-"},
    "ESS / pool size": {"sampler/ess": "-"},
    "inclusion bias [adv.]": {"sampler/inclusion_bias": "-"},
}
"""Rows of the diagnostics figure: axis label → metrics and their line styles."""
SHARES = ("zero-spread groups", "ESS / pool size", "success_rate")
"""What lies in [0, 1] and is drawn on all of it."""


class Drawing(NamedTuple):
    """A figure, and the numbers it shows."""

    figure: Figure
    data: pd.DataFrame


def _styles(points: pd.DataFrame) -> dict[str, Look]:
    return looks([str(method) for method in points["method"].unique()])


def _envs(points: pd.DataFrame) -> list[str]:
    return [str(env) for env in points["env"].unique()]


def learning_curves(points: pd.DataFrame) -> Drawing | None:
    """Held-out sampled score against updates: a panel an environment, a line a method, reference players dashed."""
    found = []
    for env, scenario in panels(points):
        frame = curve(points, env, f"eval/{scenario}/{score_metric(scenario)}")
        if frame.empty:
            log.warning("learning curves: %s has no eval/%s/%s", env, scenario, score_metric(scenario))
        else:
            found.append((env, scenario, frame.assign(scenario=scenario, kind="method")))
    if not found:
        log.warning("learning curves: left out, no job logged a held-out score")
        return None
    style = _styles(points)
    sheet = Sheet([scenario_title(env, scenario) for env, scenario, _ in found])
    tables = []
    for column, (env, scenario, frame) in enumerate(found):
        axes, score = sheet.axes(column), score_metric(scenario)
        reference = references(points, env, scenario, score)
        for method, line in frame.groupby("method", sort=False):
            draw_line(axes, line, style[str(method)])
        draw_references(sheet, axes, reference)
        set_limits(axes, pd.concat([frame[["mean", "low", "high"]], reference[["value"]]]), share=score in SHARES)
        axes.set(xlabel=UPDATES, ylabel=SCORE_LABELS[score])
        tables += [frame, reference.rename(columns={"value": "mean"}).assign(kind="reference")]
    data = pd.concat(tables, ignore_index=True)
    sheet.legend([*method_handles(style, data), *band_handles(data)])
    return Drawing(sheet.finish(), data)


def training_curves(points: pd.DataFrame) -> Drawing | None:
    """Unshaped game return of the training rollouts against updates, a panel an environment."""
    frames = {env: frame for env in _envs(points) if not (frame := curve(points, env, RETURN)).empty}
    if not frames:
        log.warning("training curves: left out, no job logged %s", RETURN)
        return None
    style = _styles(points)
    sheet = Sheet([env_title(env) for env in frames])
    for column, frame in enumerate(frames.values()):
        axes = sheet.axes(column)
        for method, line in frame.groupby("method", sort=False):
            draw_line(axes, line, style[str(method)])
        set_limits(axes, frame[["mean", "low", "high"]])
        axes.set(xlabel=UPDATES, ylabel="training return (unshaped)")
    data = pd.concat(frames.values(), ignore_index=True)
    sheet.legend([*method_handles(style, data), *band_handles(data)])
    return Drawing(sheet.finish(), data)


def final_comparison(points: pd.DataFrame) -> Drawing | None:
    """Held-out score at the last update, sampled and greedy, with 95 % intervals; small dots are single seeds."""
    table = summary(points)
    if table.empty:
        log.warning("final comparison: left out, no job logged a held-out score")
        return None
    style = _styles(points)
    cells = [(str(env), str(name), cell) for (env, name), cell in table.groupby(["env", "scenario"], sort=False)]
    names = {method: method_label(str(method)).replace(", ", "\n") for method in table["method"].unique()}
    named_below = len(names) <= 3 and max(name.count("\n") for name in names.values()) < 2
    sheet = Sheet([scenario_title(env, scenario) for env, scenario, _ in cells], plot_height=2.1, below=0.34)
    tables = []
    for column, (env, scenario, cell) in enumerate(cells):
        axes, score = sheet.axes(column), score_metric(scenario)
        methods = list(cell["method"].unique())
        drawn = [cell.assign(kind="method")]
        for row in cell.to_dict("records"):
            colour = style[row["method"]].colour
            x = methods.index(row["method"]) + (-0.14 if row["mode"] == "sampled" else 0.14)
            fill = colour if row["mode"] == "sampled" else "white"
            error = [[row["end"] - row["end_low"]], [row["end_high"] - row["end"]]]
            axes.errorbar(x, row["end"], error, color=colour, marker="o", ms=5, mfc=fill, lw=1.2, capsize=2)
            runs = last_values(points, env, row["method"], row["metric"]).rename(columns={"value": "end"})
            if len(runs) > 1:
                axes.plot([x + 0.11] * len(runs), runs["end"], ".", color=colour, ms=3, alpha=0.6, mew=0)
                drawn.append(runs.assign(kind="run", method=row["method"], mode=row["mode"], metric=row["metric"]))
        reference = references(points, env, scenario, score)
        draw_references(sheet, axes, reference)
        drawn.append(reference.rename(columns={"value": "end"}).assign(kind="reference"))
        part = pd.concat(drawn, ignore_index=True).assign(env=env, scenario=scenario)
        set_limits(axes, part[["end", "end_low", "end_high"]], share=score in SHARES)
        axes.set(xlim=(-0.6, len(methods) - 0.4), ylabel=SCORE_LABELS[score])
        axes.set_xticks(range(len(methods)), [names[method] if named_below else "" for method in methods])
        axes.grid(axis="x", visible=False)
        tables.append(part)
    handles = mode_handles(list(table["interval"]), several_seeds=bool((table["seeds"] > 1).any()))
    sheet.legend([*([] if named_below else method_handles(style, table)), *handles])
    return Drawing(sheet.finish(), pd.concat(tables, ignore_index=True))


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
    envs, style = _envs(points), _styles(points)
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
    data = pd.concat(tables, ignore_index=True)
    entropies = [
        Line2D([], [], color="#444444", ls=dashes, label=f"{metric.removeprefix('train/').replace('_', ' ')}")
        for metric, dashes in DIAGNOSTICS[ENTROPY].items()
        if metric in logged
    ]
    sheet.legend([*method_handles(style, data), *entropies, *band_handles(data)])
    return Drawing(sheet.finish(), data)


def efficiency(points: pd.DataFrame) -> Drawing | None:
    """Training return against training time and against environment steps, at the same updates."""
    columns = {}
    for metric in ("train/wall_s", "train/env_steps"):
        if metric in set(points["metric"]):
            columns[metric] = pd.concat([curve(points, env, metric) for env in _envs(points)], ignore_index=True)
        else:
            log.warning("efficiency: no job logged %s", metric)
    returns = [frame for env in _envs(points) if not (frame := curve(points, env, RETURN)).empty]
    if not columns or not returns:
        log.warning("efficiency: left out, nothing to show")
        return None
    style = _styles(points)
    sheet = Sheet([env_title(str(frame["env"].iloc[0])) for frame in returns], rows=len(columns), plot_height=1.5)
    tables = []
    for place, (metric, spent) in enumerate(columns.items()):
        divisor, unit = _unit(metric, float(spent["mean"].max()))
        for column, frame in enumerate(returns):
            keys = ["env", "method", "step"]
            joined = frame.merge(spent[[*keys, "mean"]].rename(columns={"mean": "x"}), on=keys)
            joined = joined.assign(x=joined["x"] / divisor, x_metric=metric, x_unit=unit)
            axes = sheet.axes(column, place)
            for method, line in joined.groupby("method", sort=False):
                draw_line(axes, line, style[str(method)], x="x")
            if joined.empty:
                mark_empty(axes)
            set_limits(axes, joined[["mean", "low", "high"]])
            axes.set(xlabel=unit, ylabel="training return (unshaped)", xlim=(0, None))
            tables.append(joined)
    data = pd.concat(tables, ignore_index=True)
    sheet.legend([*method_handles(style, data), *band_handles(data)])
    return Drawing(sheet.finish(), data)


def _unit(metric: str, largest: float) -> tuple[float, str]:
    """Divisor and axis label that keep tick numbers short."""
    if metric == "train/wall_s":
        units = [(3600.0, "training time [h]"), (60.0, "training time [min]"), (1.0, "training time [s]")]
    else:
        units = [
            (1e6, "environment steps [millions]"),
            (1e3, "environment steps [thousands]"),
            (1.0, "environment steps"),
        ]
    return next((unit for unit in units if largest >= 3 * unit[0]), units[-1])
