"""How things look and what they are called, the same in every figure: names, colours, limits, legend entries."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.sheet import REFERENCE_COLOUR, Sheet
from msgrpo_lab.report.curves import OVER_EPISODES, OVER_GROUPS, OVER_RUNS, OVER_SEEDS, SAMPLER_ORDER

ENV_TITLES = {
    "frozenlake": "Frozen Lake",
    "frozenlake_slippery": "Frozen Lake, slippery",
    "frozenlake_big": "Frozen Lake 6×6, slippery",
    "snake": "Snake",
    "snake_20": "Snake, 20 turns",
    "snake_poison": "Snake, poisonous apples",
    "snake_poison_banana": "Snake, poison and bananas",
}
SAMPLER_LABELS = {"uniform": "uniform", "abs_adv": "abs_adv (AAW)"}
PLAYER_LABELS = {
    "random": "random",
    "ignores_prompt": "ignores prompt",
    "hole_avoiding": "avoids holes",
    "compact_ceiling": "compact ceiling",
    "optimal": "optimal",
    "search": "search",
    "upper": "optimal or search",
}
SCORE_LABELS = {"success_rate": "held-out success rate", "return_mean": "held-out return"}
GREY = "#444444"
ONE_SEED_BANDS = {
    OVER_EPISODES: "95 % interval over evaluation episodes (one seed)",
    OVER_GROUPS: "95 % interval over the groups of a rollout (one seed)",
}
BEST_DASHES = (0, (3, 1.5))
MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", ":")
MARKS = 12
"""About how many markers a line carries."""
SHARE_LIMITS = (-0.03, 1.03)
SHARES = ("zero-spread groups", "ESS / pool size", "success_rate")
"""What lies in [0, 1] and is drawn on all of it."""
UPDATES = "optimiser updates"


class Drawing(NamedTuple):
    """A figure, and the numbers it shows."""

    figure: Figure
    data: pd.DataFrame


class Look(NamedTuple):
    """How a method is drawn in every figure."""

    label: str
    colour: str
    marker: str
    dashes: str


def env_title(env: str) -> str:
    """The environment's name as people write it; its configuration name where there is no other."""
    return ENV_TITLES.get(env, env)


def method_label(method: str) -> str:
    """The method's name with the paper's abbreviation where it has one."""
    sampler, comma, rest = method.partition(", ")
    return SAMPLER_LABELS.get(sampler, sampler) + comma + rest


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """A colour, marker and line style a method.

    The first method with the `uniform` sampler and the first with `abs_adv` look the same whatever else is drawn.
    """
    colours = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    kept = {sampler: place for place, sampler in enumerate(SAMPLER_ORDER)}
    free = itertools.count(len(kept))
    style = {}
    for method in dict.fromkeys(methods):
        place = kept.pop(method.partition(", ")[0], None)
        place = next(free) if place is None else place
        turn, colour = divmod(place, len(colours))
        style[method] = Look(method_label(method), colours[colour], MARKERS[(place + turn) % 7], DASHES[turn % 4])
    return style


def styles_of(points: pd.DataFrame) -> dict[str, Look]:
    """The looks of the methods that occur in `points`."""
    return looks([str(method) for method in points["method"].unique()])


def envs_of(points: pd.DataFrame) -> list[str]:
    """The environments that occur in `points`, in order."""
    return [str(env) for env in points["env"].unique()]


def draw_line(axes: Axes, frame: pd.DataFrame, look: Look, x: str = "step", dashes: str | None = None) -> None:
    """One method's mean and band over column `x`; `dashes` replaces the method's own line style."""
    axes.fill_between(frame[x], frame["low"], frame["high"], color=look.colour, alpha=0.16, lw=0)
    axes.plot(
        frame[x],
        frame["mean"],
        color=look.colour,
        ls=dashes or look.dashes,
        marker=look.marker,
        ms=2.6,
        markevery=max(1, len(frame) // MARKS),
    )


def draw_best(axes: Axes, frame: pd.DataFrame, look: Look) -> None:
    """One run's line over the steps, thin and dashed in its method's colour."""
    axes.plot(frame["step"], frame["mean"], color=look.colour, ls=BEST_DASHES, lw=0.9, alpha=0.9, zorder=1.9)


def best_handle() -> Artist:
    """The entry for `draw_best`."""
    return Line2D([], [], color=GREY, ls=BEST_DASHES, lw=0.9, label="single best run")


def two_digits(value: float) -> str:
    """Two decimals, a true minus sign, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def draw_references(sheet: Sheet, axes: Axes, table: pd.DataFrame) -> None:
    """Thin lines at the reference players' scores, each named at the right edge."""
    for player, value in zip(table["player"].astype(str), table["value"].astype(float), strict=True):
        axes.axhline(value, color=REFERENCE_COLOUR, lw=0.7, ls=(0, (4, 3)), zorder=1)
        name = PLAYER_LABELS.get(player, player.replace("_", " "))
        sheet.label_right(axes, value, f"{name} {two_digits(value)}")


def set_limits(axes: Axes, values: pd.DataFrame, *, share: bool = False) -> None:
    """Shares on [0, 1], or on [0, ½] if none is above; everything else on its own range with a margin.

    Bands and references count too.

    The first column of `values` is what is drawn as a line or dot; a "share" that leaves [0, 1] is drawn on its range.
    """
    numbers = values.to_numpy(dtype=np.float64).ravel()
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return
    low, high = float(numbers.min()), float(numbers.max())
    if share and values.iloc[:, 0].dropna().between(0.0, 1.0).all():
        whole = high > 0.5  # else half of the scale is drawn, so that small shares can be told apart
        axes.set_ylim(*(SHARE_LIMITS if whole else (0.5 * end for end in SHARE_LIMITS)))
        return
    margin = 0.06 * (high - low) or 0.05 * max(1.0, abs(high))
    axes.set_ylim(low - margin, high + margin)


def mark_empty(axes: Axes) -> None:
    """Say in the panel that there is nothing to show, so that it is not taken for a line at the edge."""
    axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color="#888888")
    axes.set(xticks=[], yticks=[])


def band_handles(data: pd.DataFrame) -> list[Artist]:
    """What the shaded bands mean, in words; empty where there are none."""
    handles: list[Artist] = []
    for band, cell in data.groupby("band", sort=True):
        if band == OVER_SEEDS:
            seeds = sorted({int(seed) for seed in cell["seeds"]})
            count = f"{seeds[0]}–{seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
            handles.append(Patch(color="#777777", alpha=0.25, lw=0, label=f"mean ± 1 std over {count} seeds"))
        elif band in ONE_SEED_BANDS:
            handles.append(Patch(color="#777777", alpha=0.25, lw=0, label=ONE_SEED_BANDS[str(band)]))
    return handles


def method_handles(style: Mapping[str, Look], data: pd.DataFrame) -> list[Artist]:
    """Entries for the methods that occur in `data`."""
    return [
        Line2D([], [], color=look.colour, ls=look.dashes, marker=look.marker, ms=3, label=look.label)
        for method, look in style.items()
        if method in set(data["method"])
    ]


def scenario_title(env: str, scenario: str) -> str:
    """The environment, and where it was evaluated if that is another."""
    return env_title(env) if env == scenario else f"{env_title(env)} → {env_title(scenario)}"


def mode_handles(over: Sequence[str], several_seeds: bool) -> list[Artist]:
    """Entries for filled and open dots, for what the error bars span, and for single seeds where they are drawn."""
    handles: list[Artist] = [
        Line2D([], [], color=GREY, ls="", marker="o", mfc=GREY, label="sampled"),
        Line2D([], [], color=GREY, ls="", marker="o", mfc="white", label="greedy"),
    ]
    if OVER_RUNS in over:
        handles.append(Line2D([], [], color=GREY, lw=1.2, label="95 % bootstrap interval over seeds"))
    if OVER_EPISODES in over:
        handles.append(Line2D([], [], color=GREY, lw=1.2, label=ONE_SEED_BANDS[OVER_EPISODES]))
    if several_seeds:
        handles.append(Line2D([], [], color=GREY, ls="", marker=".", ms=3, alpha=0.6, label="single seeds"))
    return handles
