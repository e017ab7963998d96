"""The figure of a comparison: each rule's fidelity with its interval, and the gradient cosine under every sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from msgrpo_lab.config.paths import PACKAGE
from msgrpo_lab.fidelity.table import HEADINGS, Cell, Comparison
from msgrpo_lab.files import written_whole

STYLE = "paper.mplstyle"
SHOWN = ("spearman", "sign_agreement", "sampled_cosine", "gradient_cosine")
"""A panel each, from what a turn is worth to where an update goes."""
PANEL_INCHES, ROW_INCHES, LABELS_INCHES, AROUND_INCHES = 1.15, 0.19, 1.05, 0.75
CELL_INCHES = 0.62
FORMATS = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
"""Each with the metadata that would make equal figures differ."""
COLOURS = "cividis"
"""Of the map: even in lightness, the same to readers with and without colour vision (Nuñez et al. 2018)."""


@contextmanager
def paper_style() -> Iterator[None]:
    """The project's figure style, whatever the user's own settings are: in a checkout, else in the installed package.

    Raises:
        FileNotFoundError: neither is there, so the installation is broken.
    """
    places = (PACKAGE.parent / "analysis" / STYLE, PACKAGE / STYLE)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{places[1]} does not exist; install the package again")
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(mpl.rc_params_from_file(found, use_default_template=False))
        yield


def draw_comparison(comparison: Comparison, title: str) -> Figure:
    """The figure; call it, and save it, inside `paper_style`."""
    rules = [cell for cell in comparison.cells if cell.sampler is None]
    samplers = list(dict.fromkeys(cell.sampler for cell in comparison.cells if cell.sampler is not None))
    height = AROUND_INCHES + ROW_INCHES * len(rules)
    map_inches = LABELS_INCHES + CELL_INCHES * len(samplers) if samplers else 0.1
    width = LABELS_INCHES + PANEL_INCHES * len(SHOWN) + map_inches
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    bottom, tall = 0.34 / height, ROW_INCHES * len(rules) / height
    for number, name in enumerate(SHOWN):
        left = (LABELS_INCHES + PANEL_INCHES * number) / width
        axes = figure.add_axes((left, bottom, 0.88 * PANEL_INCHES / width, tall))
        _dots(axes, rules, name, labelled=number == 0)
    if samplers:
        left = (LABELS_INCHES + PANEL_INCHES * len(SHOWN) + 0.95 * LABELS_INCHES) / width
        axes = figure.add_axes((left, bottom, CELL_INCHES * len(samplers) / width, tall))
        _map(axes, comparison, [cell.credit for cell in rules], samplers)
    figure.text(0.01, 1 - 0.04 / height, title, ha="left", va="top", fontsize=8, fontweight="bold")
    return figure


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes PDF, SVG and PNG; equal figures give equal bytes."""
    paths = []
    for ending, metadata in FORMATS.items():
        path = folder / f"{name}.{ending}"
        with written_whole(path) as stream:
            figure.savefig(stream, format=ending, metadata=metadata)
        paths.append(path)
    return paths


def _dots(axes: Axes, cells: Sequence[Cell], name: str, *, labelled: bool) -> None:
    """One statistic of each rule, with its interval; the first rule on top."""
    for row, cell in enumerate(reversed(cells)):
        value, low, high = cell.scores[name].estimate()
        if math.isnan(value):
            continue
        if not math.isnan(low):
            axes.plot([low, high], [row, row], color="C0", linewidth=1.0)
        axes.plot([value], [row], marker="o", markersize=3, color="C0")
    axes.set_title(HEADINGS.get(name, name), fontsize=7, fontweight="normal")
    axes.set_ylim(-0.6, len(cells) - 0.4)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -0.05), max(high, 1.05))
    axes.axvline(0.0, color="#555555", linewidth=0.6)
    names = [cell.credit for cell in reversed(cells)] if labelled else []
    axes.set_yticks(range(len(cells)), names or [""] * len(cells))
    axes.tick_params(axis="y", length=0)


def _map(axes: Axes, comparison: Comparison, rules: Sequence[str], samplers: Sequence[str]) -> None:
    """Gradient cosine of every rule under every sampler, as colour and as a number."""
    value_RS = np.array(
        [[comparison.of(rule, one).scores["gradient_cosine"].estimate().value for one in samplers] for rule in rules]
    )
    low = min(0.9, math.floor(10 * np.nanmin(value_RS)) / 10) if np.isfinite(value_RS).any() else 0.0
    axes.imshow(value_RS, cmap=COLOURS, vmin=low, vmax=1.0, aspect="auto")
    for row, column in np.ndindex(*value_RS.shape):
        value = value_RS[row, column]
        dark = not (value - low) / (1.0 - low) > 0.55
        text = "–" if math.isnan(value) else f"{value:.2f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if dark else "black")
    axes.set_title(
        f"gradient cosine, {comparison.num_episodes} of {comparison.episodes} episodes drawn",
        fontsize=7,
        fontweight="normal",
    )
    axes.set_yticks(range(len(rules)), rules)
    axes.set_xticks(range(len(samplers)), [name.replace("_", "_\n", 1) for name in samplers])
    axes.tick_params(length=0)
    axes.grid(False)
