"""A sheet of panels laid out in inches: plots of equal size, a legend above them, labels at their right edge.

Everything is drawn on matplotlib's `Figure`, without pyplot and its global state, so equal input gives equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STYLE = Path(__file__).with_name("paper.mplstyle")
COLUMNS = 2
CELL = 3.4
"""Inches a panel takes in width: one in a column of a two-column page, two across it."""
LEFT, RIGHT, GAP = 0.56, 0.12, 0.08
TITLE, BELOW, EDGE = 0.26, 0.42, 0.06
LABEL_SIZE = 6.2
REFERENCE_COLOUR = "#6b6b6b"


@contextmanager
def paper_style() -> Iterator[None]:
    """Matplotlib's defaults plus `paper.mplstyle`, whatever the user's own settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(mpl.rc_params_from_file(STYLE, use_default_template=False))
        yield


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as keeps them `gap` apart, in order, and inside [low, high] where they fit.

    Positions that collide are pooled and centred on their mean (pool-adjacent-violators on position − rank · gap), and
    the whole is then clamped to the two ends; `low` wins where there is no room. The result is in the input's order.
    """
    order = sorted(range(len(positions)), key=lambda i: (positions[i], i))
    pools: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        pools.append((positions[i] - rank * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (left, n), (right, m) = pools[-2:]
            pools[-2:] = [((left * n + right * m) / (n + m), n + m)]
    levels = [value for value, count in pools for _ in range(count)]
    ceiling = high - (len(positions) - 1) * gap
    placed = [0.0] * len(positions)
    for rank, i in enumerate(order):
        placed[i] = max(low, min(levels[rank], ceiling)) + rank * gap
    return placed


class Sheet:
    """Panels in blocks of `rows` rows and up to two columns, one column an environment.

    Draw into `sheet.axes(column, row)`, name what needs naming with `label_right` and `legend`, then `finish()`.
    """

    def __init__(
        self,
        titles: Sequence[str],
        rows: int = 1,
        plot_height: float = 1.7,
        between: float = BELOW,
        below: float = BELOW,
        lefts: Sequence[float] = (LEFT, LEFT),
    ) -> None:
        """Empty panels.

        Args:
            titles: one a column; after every second one a new block begins below.
            rows: panels a column.
            plot_height: height of a plot, inches.
            between: room between the plots of a column, inches: less where only the lowest names its axis.
            below: room under a column's lowest plot, inches.
            lefts: room left of the plots of the first and of the second column, inches.

        Raises:
            ValueError: no titles.
        """
        if not titles:
            raise ValueError("titles is empty: a sheet needs at least one panel")
        self.figure = Figure(figsize=(CELL, CELL))
        FigureCanvasAgg(self.figure)
        self._rows, self._height, self._between, self._below = rows, plot_height, between, below
        self._lefts = tuple(lefts)
        self._handles: list[Artist] = []
        self._axes = [
            [self.figure.add_axes((0, 0, 1, 1), label=f"{column}/{row}") for row in range(rows)]
            for column in range(len(titles))
        ]
        self._labels: dict[Axes, list[tuple[float, str]]] = {}
        for column, title in zip(self._axes, titles, strict=True):
            column[0].set_title(title)
            for axes in column:
                axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
                axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))

    def axes(self, column: int, row: int = 0) -> Axes:
        """The panel of environment `column`, `row` from the top of its block."""
        return self._axes[column][row]

    def legend(self, handles: Sequence[Artist]) -> None:
        """Labelled artists to name above the panels, outside the data."""
        self._handles = list(handles)

    def label_right(self, axes: Axes, value: float, text: str) -> None:
        """Name the height `value` at the panel's right edge; labels that would collide are moved apart."""
        self._labels.setdefault(axes, []).append((value, text))

    def finish(self) -> Figure:
        """Set sizes and positions, and place legend and labels."""
        columns = min(COLUMNS, len(self._axes))
        blocks = -(-len(self._axes) // COLUMNS)
        width = CELL * columns
        self.figure.set_size_inches(width, CELL)
        right = self._label_width() + GAP if self._labels else RIGHT
        top = self._legend(width)
        block_height = TITLE + self._rows * self._height + (self._rows - 1) * self._between + self._below
        height = top + blocks * block_height + EDGE
        self.figure.set_size_inches(width, height)
        for index, column in enumerate(self._axes):
            block, place = divmod(index, COLUMNS)
            for row, axes in enumerate(column):
                bottom = (
                    height - top - block * block_height - TITLE - row * (self._height + self._between) - self._height
                )
                left = self._lefts[place]
                box = (place * CELL + left, bottom, CELL - left - right, self._height)
                axes.set_position((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
                axes.yaxis.set_label_coords((0.12 - left) / box[2], 0.5)
        for legend in self.figure.legends:
            legend.set_bbox_to_anchor((0.5, 1.0 - EDGE / height), transform=self.figure.transFigure)
        for axes, labels in self._labels.items():
            self._place(axes, labels)
        return self.figure

    def _legend(self, width: float) -> float:
        """Make the legend as wide as fits; returns the inches it takes at the top."""
        if not self._handles:
            return EDGE
        for columns in range(len(self._handles), 0, -1):
            legend = self.figure.legend(handles=self._handles, loc="upper center", ncols=columns)
            box = legend.get_window_extent(self.figure.canvas.get_renderer())  # type: ignore[attr-defined]
            if columns == 1 or box.width / self.figure.dpi <= width - 0.1:
                break
            legend.remove()
        return float(box.height / self.figure.dpi) + 2 * EDGE

    def _label_width(self) -> float:
        """Inches that the longest label and its leader take."""
        widest = 0.0
        for _, text in (label for labels in self._labels.values() for label in labels):
            artist = self.figure.text(0, 0, text, fontsize=LABEL_SIZE)
            box = artist.get_window_extent(self.figure.canvas.get_renderer())  # type: ignore[attr-defined]
            widest = max(widest, box.width / self.figure.dpi)
            artist.remove()
        return widest + 0.1

    def _place(self, axes: Axes, labels: Sequence[tuple[float, str]]) -> None:
        """Write the labels beside the panel, with a leader from the true height to each."""
        low, high = axes.get_ylim()
        inches = [(value - low) / (high - low) * self._height for value, _ in labels]
        placed = spread(inches, LABEL_SIZE / 72 * 1.3, 0.0, self._height)
        panel = axes.get_position().width * self.figure.get_size_inches()[0]
        for (_, text), true, shown in zip(labels, inches, placed, strict=True):
            ends = (true / self._height, shown / self._height)
            axes.plot([1.0, 1.0 + 0.07 / panel], ends, transform=axes.transAxes, color="#aaaaaa", lw=0.5, clip_on=False)
            axes.text(
                1.0 + 0.09 / panel,
                ends[1],
                text,
                transform=axes.transAxes,
                fontsize=LABEL_SIZE,
                color=REFERENCE_COLOUR,
                ha="left",
                va="center_baseline",
            )
