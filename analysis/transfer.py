"""The transfer matrix: trained on one scenario, evaluated on another. One function a figure."""

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

from analysis.cells import ENV_ORDER, rank
from analysis.evaluations import transfer
from analysis.looks import GREY, PLAYER_LABELS, Drawing, env_title, method_label, two_digits

log = logging.getLogger("analysis.transfer")

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
