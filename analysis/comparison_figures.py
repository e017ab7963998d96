"""Methods beside each other: what a sampler gains, how near the optimum a score is, and what it cost.

One function a figure, as in `analysis.figures`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.ablation import ALL, AT_TOKENS, AT_UPDATES, NORMALISED, ablation
from analysis.curves import OVER_EPISODES, OVER_RUNS
from analysis.looks import (
    GREY,
    ONE_SEED_BANDS,
    Drawing,
    env_title,
    method_handles,
    scenario_title,
    styles_of,
)
from analysis.panels import REFERENCE_COLOUR, Sheet
from analysis.scores import normalised_scores, profiles

log = logging.getLogger("analysis.comparison_figures")

NAMES = 1.32
"""Inches for the names of scenarios left of a panel."""
INTERVALS = {OVER_RUNS: "95 % interval over seeds", OVER_EPISODES: ONE_SEED_BANDS[OVER_EPISODES]}
ROW, BETWEEN, SPREAD = 0.34, 0.066, 0.52
"""Inches a scenario takes in height at least, and between two of its marks; share of its height that they take."""


def _list_scenarios(axes: Axes, titles: Sequence[str], *, named: bool) -> None:
    """Scenarios from top to bottom along the vertical axis."""
    axes.set(ylim=(len(titles) - 0.5, -0.5))
    axes.set_yticks(range(len(titles)), [title.replace(", ", ",\n") if named else "" for title in titles])
    axes.grid(axis="y", visible=False)


def _offsets(count: int) -> list[float]:
    """Heights around a row's middle for `count` marks."""
    return [0.0] if count == 1 else [float(y) for y in np.linspace(-SPREAD / 2, SPREAD / 2, count)]


def _height(rows: int, marks: int) -> float:
    """Inches for so many scenarios of so many marks, none on another."""
    return rows * max(ROW, BETWEEN * (marks - 1) / SPREAD) + 0.1


def _mark(axes: Axes, y: float, value: float, ends: tuple[float, float], colour: str, *, filled: bool) -> None:
    """A dot with its interval, where it has one."""
    low, high = ends
    if np.isfinite([low, high]).all():
        axes.plot([low, high], [y, y], color=colour, lw=1.2, solid_capstyle="butt")
    axes.plot(value, y, "o", color=colour, ms=4.2, mfc=colour if filled else "white")


def _limit(axes: Axes, drawn: pd.DataFrame) -> None:
    """Intervals in full, unless two seeds make one wider than the whole scale of scores: it then leaves the panel."""
    ends = drawn[["difference", "low", "high"]].to_numpy(dtype=np.float64)
    widest = max(1.0, float(drawn["difference"].abs().max()))
    reach = 1.08 * min(float(np.nanmax(np.abs(ends))), widest) or 1.0
    axes.set_xlim(-reach, reach)


def sampler_ablation(points: pd.DataFrame) -> Drawing | None:
    """What a sampler gains over uniform drawing, sampled play, at equal updates (filled) and equal tokens (open).

    Left the difference of normalised scores, right the probability that a run of the method beats one of uniform
    drawing; `analysis.ablation` says how. The data hold greedy play and raw scores too.
    """
    table = ablation(points)
    drawn = table[(table["score"] == NORMALISED) & (table["mode"] == "sampled")] if len(table) else table
    if drawn.empty:
        log.warning("sampler ablation: left out, no sampler has runs beside uniform drawing with normalised scores")
        return None
    if (drawn["pairs"] < 2).any():
        log.warning("sampler ablation: with one seed a difference has no interval")
    envs = list(drawn["env"].unique())
    style = styles_of(points)
    marks = [
        (method, budget)
        for method in drawn["method"].unique()
        for budget in (AT_UPDATES, AT_TOKENS)
        if ((drawn["method"] == method) & (drawn["budget"] == budget)).any()
    ]
    titles = ["Gain in normalised score", "Probability of improvement"]
    sheet = Sheet(titles, plot_height=_height(len(envs), len(marks)), lefts=(NAMES, 0.3))
    panels = (("difference", "low", "high", 0.0), ("better", "better_low", "better_high", 0.5))
    for column, (value, low, high, nothing) in enumerate(panels):
        axes = sheet.axes(column)
        axes.axvline(nothing, color=REFERENCE_COLOUR, lw=0.7, ls=(0, (4, 3)), zorder=1)
        _list_scenarios(axes, [ALL if env == ALL else env_title(env) for env in envs], named=column == 0)
        if ALL in envs:
            axes.axhline(envs.index(ALL) - 0.5, color="#bbbbbb", lw=0.6)
        for (method, budget), offset in zip(marks, _offsets(len(marks)), strict=True):
            cell = drawn[(drawn["method"] == method) & (drawn["budget"] == budget)]
            for row in cell.to_dict("records"):
                y = envs.index(row["env"]) + offset
                ends = (row[low], row[high])
                _mark(axes, y, row[value], ends, style[str(method)].colour, filled=budget == AT_UPDATES)
    _limit(sheet.axes(0), drawn)
    sheet.axes(0).set(xlabel="difference from uniform drawing")
    sheet.axes(1).tick_params(axis="y", length=0)
    sheet.axes(1).set(xlabel="P(a run beats one with uniform drawing)", xlim=(-0.03, 1.03))
    filled = {AT_UPDATES: GREY, AT_TOKENS: "white"}
    handles: list[Artist] = [
        Line2D([], [], color=GREY, ls="", marker="o", mfc=filled[budget], label=f"at {budget}")
        for budget in dict.fromkeys(budget for _, budget in marks)
    ]
    if (drawn["pairs"] > 1).any():
        handles.append(Line2D([], [], color=GREY, lw=1.2, label="95 % interval over seeds"))
    sheet.legend([*method_handles(style, drawn), *handles])
    return Drawing(sheet.finish(), table)


def score_against_optimal(points: pd.DataFrame) -> Drawing | None:
    """Normalised held-out score at the last update, sampled play: 0 is random play, 1 the upper reference player.

    Left a row a scenario, untrained scores as open dots; right, with several runs, the share of runs above each score
    (performance profile) over the scenarios that every method has.
    """
    table = normalised_scores(points)
    if table.empty:
        log.warning("score against optimal: left out, no job logged a normalised held-out score")
        return None
    rows = list(table[["env", "scenario"]].drop_duplicates().itertuples(index=False, name=None))
    methods, style = list(table["method"].unique()), styles_of(points)
    profile = profiles(points)
    titles = ["Normalised score", *([] if profile.empty else ["Runs above a score"])]
    sheet = Sheet(titles, plot_height=max(1.3, _height(len(rows), len(methods))), lefts=(NAMES, 0.56))
    axes = sheet.axes(0)
    for end in (0.0, 1.0):
        axes.axvline(end, color=REFERENCE_COLOUR, lw=0.7, ls=(0, (4, 3)), zorder=1)
    _list_scenarios(axes, [scenario_title(env, scenario) for env, scenario in rows], named=True)
    offsets = dict(zip(methods, _offsets(len(methods)), strict=True))
    for row in table.to_dict("records"):
        y, colour = rows.index((row["env"], row["scenario"])) + offsets[row["method"]], style[row["method"]].colour
        axes.plot(row["start"], y, "o", color=colour, ms=3.2, mfc="white", mew=0.7)
        _mark(axes, y, row["end"], (row["low"], row["high"]), colour, filled=True)
    axes.set(xlabel="0: random, 1: optimal or search")
    handles: list[Artist] = [
        Line2D([], [], color=GREY, ls="", marker="o", ms=3.2, mfc="white", label="before the first update"),
        Line2D([], [], color=GREY, ls="", marker="o", ms=4.2, label="after the last"),
        *(Line2D([], [], color=GREY, lw=1.2, label=text) for text in _intervals(table)),
    ]
    if not profile.empty:
        axes = sheet.axes(1)
        for method, line in profile.groupby("method", sort=False):
            look = style[str(method)]
            axes.fill_between(
                line["threshold"], line["low"], line["high"], color=look.colour, alpha=0.16, lw=0, step="post"
            )
            axes.plot(line["threshold"], line["share"], color=look.colour, ls=look.dashes, drawstyle="steps-post")
        axes.set(xlabel="normalised score τ", ylabel="share of runs above τ", ylim=(-0.03, 1.03))
    sheet.legend([*method_handles(style, table), *handles])
    data = pd.concat([table.assign(kind="score"), profile.assign(kind="profile")], ignore_index=True)
    return Drawing(sheet.finish(), data)


def _intervals(table: pd.DataFrame) -> list[str]:
    known = table[table["low"].notna() & table["high"].notna()]
    return [INTERVALS[str(kind)] for kind in known["interval"].unique()]
