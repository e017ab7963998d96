"""Scores over training and at its end. One function a figure: tidy points in, a drawing and the very numbers out.

`points` is the table of `analysis.cells.join`. A figure with nothing to show is None; a warning says what is missing.
"""

from __future__ import annotations

import logging

import pandas as pd

from analysis.cells import panels, score_metric
from analysis.curves import best_run, curve, last_values, references, summary
from analysis.looks import (
    SCORE_LABELS,
    SHARES,
    UPDATES,
    Drawing,
    band_handles,
    best_handle,
    draw_best,
    draw_line,
    draw_references,
    env_title,
    envs_of,
    method_handles,
    method_label,
    mode_handles,
    scenario_title,
    set_limits,
    styles_of,
)
from analysis.panels import Sheet

log = logging.getLogger("analysis.figures")

RETURN = "train/return_mean"


def learning_curves(points: pd.DataFrame) -> Drawing | None:
    """The paper's figure: held-out sampled score against updates, a panel an environment, a line a method.

    Mean over runs with its band, the single best run dashed (`analysis.curves.best_run`), and a thin line a reference
    player or evaluated model.
    """
    found = []
    for env, scenario in panels(points):
        metric = f"eval/{scenario}/{score_metric(scenario)}"
        frame = curve(points, env, metric)
        if frame.empty:
            log.warning("learning curves: %s has no %s", env, metric)
        else:
            found.append((env, scenario, metric, frame.assign(scenario=scenario, kind="method")))
    if not found:
        log.warning("learning curves: left out, no job logged a held-out score")
        return None
    style = styles_of(points)
    sheet = Sheet([scenario_title(env, scenario) for env, scenario, _, _ in found])
    tables = []
    for column, (env, scenario, metric, frame) in enumerate(found):
        axes, score = sheet.axes(column), score_metric(scenario)
        reference = references(points, env, scenario, score).rename(columns={"value": "mean"})
        drawn = [frame]
        for method, line in frame.groupby("method", sort=False):
            draw_line(axes, line, style[str(method)])
            best = best_run(points, env, str(method), metric).rename(columns={"value": "mean"})
            if not best.empty:
                draw_best(axes, best, style[str(method)])
                names = {"env": env, "scenario": scenario, "method": method, "metric": metric, "kind": "best run"}
                drawn.append(best.assign(**names))
        draw_references(sheet, axes, reference.rename(columns={"mean": "value"}))
        part = pd.concat([*drawn, reference.assign(kind="reference")], ignore_index=True)
        set_limits(axes, part[["mean", "low", "high"]], share=score in SHARES)
        axes.set(xlabel=UPDATES, ylabel=SCORE_LABELS[score])
        tables.append(part)
    data = pd.concat(tables, ignore_index=True)
    handles = [*method_handles(style, data), *band_handles(data)]
    sheet.legend([*handles, best_handle()] if (data["kind"] == "best run").any() else handles)
    return Drawing(sheet.finish(), data)


def training_curves(points: pd.DataFrame) -> Drawing | None:
    """Unshaped game return of the training rollouts against updates, a panel an environment."""
    frames = {env: frame for env in envs_of(points) if not (frame := curve(points, env, RETURN)).empty}
    if not frames:
        log.warning("training curves: left out, no job logged %s", RETURN)
        return None
    style = styles_of(points)
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
    style = styles_of(points)
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
