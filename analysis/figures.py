"""Scores over training and at its end. One function a figure: tidy points in, a drawing and the very numbers out.

`points` is the table of `msgrpo_lab.report.curves.join`. A figure with nothing to show is None; a warning says what is
missing.
"""

from __future__ import annotations

import logging
import math
import textwrap

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis.evaluations import transfer
from analysis.sheet import Sheet
from analysis.style import (
    GREY,
    PLAYER_LABELS,
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
    two_digits,
)
from msgrpo_lab.report.curves import (
    ENV_ORDER,
    best_run,
    curve,
    last_values,
    panels,
    rank,
    references,
    score_metric,
    summary,
)

log = logging.getLogger("analysis.figures")

RETURN = "train/return_mean"


def learning_curves(points: pd.DataFrame) -> Drawing | None:
    """The paper's figure: held-out sampled score against updates, a panel an environment, a line a method.

    Mean over runs with its band, the single best run dashed (`msgrpo_lab.report.curves.best_run`), and a thin line a
    reference player or evaluated model.
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


NAMES, RIGHT, TOP, EDGE, BELOW = 1.9, 0.1, 0.48, 0.06, 0.42
CELL_HEIGHT, CELL_WIDTH, NARROWEST = 0.34, 0.68, 3.4
"""Inches; seven scenarios take the width of a page."""
TITLE_CHARS, NAME_CHARS = 12, 34
"""What fits above a column, and beside a row, in one line."""
FRAME = "#D55E00"
COLOURS = "cividis"
"""Dark to light with even steps for every kind of colour vision (Nuñez et al. 2018)."""
KINDS = {"player": "", "base": "untrained ", "remote": "served "}


def row_name(kind: str, trained_on: str, method: str) -> str:
    """What a row of the matrix was: a player, a model as it is, or a scenario and the method it was trained with."""
    if kind == "trained":
        names = (env_title(trained_on), method_label(method))
        return " · ".join(names) if sum(map(len, names)) <= NAME_CHARS else "\n".join(names)
    name = PLAYER_LABELS.get(method, method.rpartition("/")[2]) if kind == "player" else method.rpartition("/")[2]
    return KINDS[kind] + name.removeprefix("untrained ")


def transfer_matrix(evaluations: pd.DataFrame) -> Drawing | None:
    """Normalised score, sampled play, of every policy (rows) on every scenario (columns); means over training runs.

    Below a mean stands its 95 % interval, over runs (n of them) or, with a single one, over episodes. The scenario
    that a row was trained on has a frame.
    """
    table = transfer(evaluations)
    if table.empty:
        log.warning(
            "transfer matrix: left out, these runs were not evaluated; use python -m msgrpo_lab.evaluate policy=<run>"
        )
        return None
    rows = list(table[["kind", "trained_on", "method"]].drop_duplicates().itertuples(index=False, name=None))
    scenarios = sorted(table["scenario"].unique(), key=lambda name: rank(name, ENV_ORDER))
    width = max(NARROWEST, NAMES + CELL_WIDTH * len(scenarios) + RIGHT)
    height = TOP + CELL_HEIGHT * len(rows) + BELOW
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    panel = (CELL_WIDTH * len(scenarios), CELL_HEIGHT * len(rows))
    axes = figure.add_axes((NAMES / width, BELOW / height, panel[0] / width, panel[1] / height))
    axes.set(xlim=(-0.5, len(scenarios) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(scenarios)), [textwrap.fill(env_title(name), TITLE_CHARS) for name in scenarios])
    axes.set_yticks(range(len(rows)), [row_name(*row) for row in rows])
    for cell in table.to_dict("records"):
        place = (rows.index((cell["kind"], cell["trained_on"], cell["method"])), scenarios.index(cell["scenario"]))
        _fill(axes, place, cell, own=cell["trained_on"] == cell["scenario"])
    trained = [place for place, row in enumerate(rows) if row[0] == "trained"]
    if trained and trained[0] > 0:
        axes.axhline(trained[0] - 0.5, color="#333333", lw=0.8)
    over = "over n runs where n is given, else over episodes" if (table["runs"] > 1).any() else "over episodes"
    note = f"normalised score (0 random, 1 optimal or search), 95 % interval\n{over}; framed: trained on that scenario"
    figure.text(1 - RIGHT / width, EDGE / height, note, fontsize=6.2, color=GREY, ha="right", va="bottom")
    return Drawing(figure, table)


def _fill(axes: Axes, place: tuple[int, int], cell: dict[str, object], *, own: bool) -> None:
    """One cell: its colour, mean and interval."""
    y, x = place
    value, low, high = (float(str(cell[key])) for key in ("value", "low", "high"))
    colour = mpl.colormaps[COLOURS](float(np.clip(value, 0.0, 1.0)))
    frame = {"edgecolor": FRAME, "lw": 1.3} if own else {"edgecolor": "none"}
    axes.add_patch(mpl.patches.Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, facecolor=colour, **frame))
    luminance = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]
    ink = "black" if luminance > 0.45 else "white"
    runs = f"  n={cell['runs']}" if cell["runs"] != 1 else ""
    axes.text(x, y - 0.14, f"{two_digits(value)}{runs}", ha="center", va="center", color=ink, fontsize=6.6)
    if math.isfinite(low) and math.isfinite(high):
        axes.text(
            x, y + 0.22, f"[{two_digits(low)}, {two_digits(high)}]", ha="center", va="center", color=ink, fontsize=5.2
        )
