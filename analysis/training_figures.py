"""What goes on inside training: entropies, groups without spread, the sampler's bias, and how true the credit is.

One function a figure, as in `analysis.figures`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pandas as pd
from matplotlib.lines import Line2D

from analysis.curves import OVER_EPISODES, OVER_GROUPS, curve
from analysis.looks import (
    GREY,
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
from analysis.panels import Sheet

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
