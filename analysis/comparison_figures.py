"""Methods beside each other: what a sampler gains, how near the optimum a score is, and what it cost.

One function a figure, as in `analysis.figures`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.sheet import REFERENCE_COLOUR, Sheet
from analysis.style import (
    GREY,
    ONE_SEED_BANDS,
    Drawing,
    env_title,
    method_handles,
    scenario_title,
    styles_of,
)
from analysis.training_figures import TOKENS, spent_before
from msgrpo_lab.intervals import mean_of_means, probability_of_improvement, stratified_bootstrap, t_interval
from msgrpo_lab.report.comparisons import improvement_interval, normalised_scores, profiles, sign_test
from msgrpo_lab.report.curves import BOOTSTRAP_SEED, MODES, OVER_EPISODES, OVER_RUNS, score_metric

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
    drawing; `analysis.comparison_figures` says how. The data hold greedy play and raw scores too.
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
