"""Every credit rule under every sampler on one rollout: measured, and as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from msgrpo_lab.config.paths import PACKAGE
from msgrpo_lab.credit.base import CreditAssigner
from msgrpo_lab.fidelity.meter import CREDIT_SCORES, DRAWN_SCORES, Reduction, draw_repeatedly, measure, yardstick_of
from msgrpo_lab.fidelity.statistics import Estimate, Score, resample_groups
from msgrpo_lab.fidelity.truth import LakeTruth
from msgrpo_lab.files import written_whole
from msgrpo_lab.sampler.base import EpisodeSampler, with_outcomes
from msgrpo_lab.types import RolloutBatch

BASE_CREDIT = "episode_return"
"""MS-GRPO's rule, which the others are compared with."""
BASE_SAMPLER = "uniform"
ALL_EPISODES = "all episodes"
"""Stands where a sampler's name would."""
OVER_BASE_CREDIT = "over_episode_return"
"""`gradient_cosine` minus that of MS-GRPO's rule on the same episodes."""
OVER_BASE_SAMPLER = "over_uniform"
"""`gradient_cosine` minus that of uniform drawing under the same credit rule."""
HEADINGS: Mapping[str, str] = {
    "wrong_sign": "wrong sign",
    "sign_agreement": "sign agreement",
    "gradient_cosine": "gradient cosine",
    "sampled_cosine": "sampled cosine",
    "gradient_variance": "gradient variance",
    "pool_cosine": "pool cosine",
    "norm_ratio": "norm ratio",
    "ess": "ESS",
    "mean_advantage": "mean advantage",
    "inclusion_bias": "inclusion bias",
    OVER_BASE_CREDIT: "cosine over episode_return",
    OVER_BASE_SAMPLER: "cosine over uniform",
}


class RuleUnderSampler(NamedTuple):
    """One credit rule under one sampler, or on all episodes."""

    credit: str
    sampler: str | None
    scores: Mapping[str, Score]
    """By name, differences from the base rule and the base sampler included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All cells, and what they were measured on."""

    cells: tuple[RuleUnderSampler, ...]
    episodes: int
    groups: int
    turns: int
    num_episodes: int
    """K, episodes drawn."""
    draws: int
    resamples: int
    reduction: Reduction
    exact_policy: bool
    """Whether the policy's action probabilities are exact, or estimated from completions."""

    def of(self, credit: str, sampler: str | None = None) -> RuleUnderSampler:
        """One cell.

        Raises:
            KeyError: it was not measured.
        """
        for cell in self.cells:
            if (cell.credit, cell.sampler) == (credit, sampler):
                return cell
        raise KeyError(f"credit={credit}, sampler={sampler}")


def compare(
    batch: RolloutBatch,
    truth: LakeTruth,
    rules: Mapping[str, CreditAssigner],
    samplers: Mapping[str, EpisodeSampler],
    *,
    num_episodes: int,
    draws: int = 8,
    resamples: int = 200,
    reduction: Reduction = "sum",
    rng: np.random.Generator,
) -> Comparison:
    """Measures every rule on all episodes and under every sampler.

    All cells share resamples, and the generators that samplers draw with, so that differences between cells hold the
    rules' and samplers' own differences above all.

    Args:
        batch: the rollout, with `exact_adv` if a rule reads it.
        truth: of the same rollout.
        rules: by name.
        samplers: by name.
        num_episodes: K, at most the rollout's.
        draws: times each sampler draws.
        resamples: of the groups, at least 2 a draw.
        reduction: what the gradients add up.
        rng: all chance.

    Raises:
        ValueError: what a rule or a sampler raises.
    """
    resample_rng, draw_rng = rng.spawn(2)
    seeds = draw_rng.bit_generator.seed_seq.spawn(draws)  # type: ignore[attr-defined]  # every PCG64 has one
    yardstick = yardstick_of(batch, truth)
    times_RG = resample_groups(yardstick.num_groups, resamples, resample_rng)
    cells = []
    for name, rule in rules.items():
        credit = with_outcomes(batch, rule(batch))
        cells.append(RuleUnderSampler(name, None, measure(yardstick, credit, times_RG, reduction=reduction)))
        for sampler_name, sampler in samplers.items():
            rngs = [np.random.default_rng(seed) for seed in seeds]
            picked = draw_repeatedly(sampler, credit, batch, num_episodes, rngs)
            scores = measure(yardstick, credit, times_RG, draws=picked, reduction=reduction)
            cells.append(RuleUnderSampler(name, sampler_name, scores))
    return Comparison(
        cells=tuple(_with_differences(cells)),
        episodes=len(batch.episodes),
        groups=yardstick.num_groups,
        turns=int(batch.num_turns.sum()),
        num_episodes=num_episodes,
        draws=draws,
        resamples=resamples,
        reduction=reduction,
        exact_policy=truth.table.exact,
    )


def _with_differences(cells: Sequence[RuleUnderSampler]) -> list[RuleUnderSampler]:
    """The cells with what their gradient cosine has over the base rule's and the base sampler's."""
    cosine_of = {(cell.credit, cell.sampler): cell.scores["gradient_cosine"] for cell in cells}
    extended = []
    for cell in cells:
        added = {}
        bases = {OVER_BASE_CREDIT: (BASE_CREDIT, cell.sampler)}
        if cell.sampler is not None:
            bases[OVER_BASE_SAMPLER] = (cell.credit, BASE_SAMPLER)
        for name, base in bases.items():
            if base in cosine_of and base != (cell.credit, cell.sampler):
                added[name] = cell.scores["gradient_cosine"].minus(cosine_of[base])
        extended.append(cell._replace(scores={**cell.scores, **added}))
    return extended


COLUMNS = (*CREDIT_SCORES, OVER_BASE_CREDIT, *DRAWN_SCORES, OVER_BASE_SAMPLER)


def as_csv(comparison: Comparison) -> str:
    """One line a cell: credit, sampler (empty: all episodes), and every score with both ends of its interval."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["credit", "sampler", *(f"{name}{end}" for name in COLUMNS for end in ("", "_low", "_high"))])
    for cell in comparison.cells:
        numbers = [
            "" if math.isnan(value) else f"{value:.6g}"
            for name in COLUMNS
            for value in (cell.scores[name].estimate() if name in cell.scores else (math.nan,) * 3)
        ]
        writer.writerow([cell.credit, cell.sampler or "", *numbers])
    return stream.getvalue()


def as_markdown(comparison: Comparison, title: str) -> str:
    """Two tables, rules on all episodes and rules under samplers, with what they were measured on above them."""
    of_rules = [*CREDIT_SCORES, OVER_BASE_CREDIT]
    of_samplers = [*CREDIT_SCORES, OVER_BASE_CREDIT, OVER_BASE_SAMPLER, *DRAWN_SCORES]
    policy = "exact" if comparison.exact_policy else "estimated from completions"
    lines = [
        f"# {title}",
        "",
        f"{comparison.episodes} episodes, {comparison.groups} groups, {comparison.turns} turns; action probabilities "
        f"are {policy}. 95 % intervals over groups ({comparison.resamples} resamples) and, under samplers, over "
        f"{comparison.draws} draws of {comparison.num_episodes} episodes. Gradients add up turns by "
        f"`{comparison.reduction}`.",
        "",
        "## Credit rules on all episodes",
        "",
        *_rows([cell for cell in comparison.cells if cell.sampler is None], of_rules, with_sampler=False),
    ]
    drawn = [cell for cell in comparison.cells if cell.sampler is not None]
    if drawn:
        lines += ["", "## Credit rules under samplers", "", *_rows(drawn, of_samplers, with_sampler=True)]
    return "\n".join([*lines, ""])


def _rows(cells: Sequence[RuleUnderSampler], names: Sequence[str], *, with_sampler: bool) -> list[str]:
    head = ["credit", *(["sampler"] if with_sampler else []), *(HEADINGS.get(name, name) for name in names)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for cell in cells:
        numbers = [render_estimate(cell.scores[name].estimate()) if name in cell.scores else "" for name in names]
        who = [cell.credit, *([str(cell.sampler)] if with_sampler else [])]
        lines.append(f"| {' | '.join([*who, *numbers])} |")
    return lines


def render_estimate(estimate: Estimate) -> str:
    """`0.707 [0.577, 0.837]`; `–` where it is not defined, and without an interval that there is none of."""
    if math.isnan(estimate.value):
        return "–"
    value = f"{estimate.value:.3f}"
    return value if math.isnan(estimate.low) else f"{value} [{estimate.low:.3f}, {estimate.high:.3f}]"


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


def _dots(axes: Axes, cells: Sequence[RuleUnderSampler], name: str, *, labelled: bool) -> None:
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
