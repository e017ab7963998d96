"""Every credit rule under every sampler on one rollout: measured, and as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from msgrpo_lab.credit.base import CreditAssigner
from msgrpo_lab.fidelity.estimate import Estimate, Score, resample_groups
from msgrpo_lab.fidelity.meter import CREDIT_SCORES, DRAWN_SCORES, Reduction, draw_repeatedly, measure, yardstick_of
from msgrpo_lab.rollout.truth import LakeTruth
from msgrpo_lab.sampler.base import EpisodeSampler
from msgrpo_lab.sampler.outcomes import with_outcomes
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


class Cell(NamedTuple):
    """One credit rule under one sampler, or on all episodes."""

    credit: str
    sampler: str | None
    scores: Mapping[str, Score]
    """By name, differences from the base rule and the base sampler included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All cells, and what they were measured on."""

    cells: tuple[Cell, ...]
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

    def of(self, credit: str, sampler: str | None = None) -> Cell:
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
        cells.append(Cell(name, None, measure(yardstick, credit, times_RG, reduction=reduction)))
        for sampler_name, sampler in samplers.items():
            rngs = [np.random.default_rng(seed) for seed in seeds]
            picked = draw_repeatedly(sampler, credit, batch, num_episodes, rngs)
            scores = measure(yardstick, credit, times_RG, draws=picked, reduction=reduction)
            cells.append(Cell(name, sampler_name, scores))
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


def _with_differences(cells: Sequence[Cell]) -> list[Cell]:
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


def _rows(cells: Sequence[Cell], names: Sequence[str], *, with_sampler: bool) -> list[str]:
    head = ["credit", *(["sampler"] if with_sampler else []), *(HEADINGS.get(name, name) for name in names)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for cell in cells:
        numbers = [shown(cell.scores[name].estimate()) if name in cell.scores else "" for name in names]
        who = [cell.credit, *([str(cell.sampler)] if with_sampler else [])]
        lines.append(f"| {' | '.join([*who, *numbers])} |")
    return lines


def shown(estimate: Estimate) -> str:
    """`0.707 [0.577, 0.837]`; `–` where it is not defined, and without an interval that there is none of."""
    if math.isnan(estimate.value):
        return "–"
    value = f"{estimate.value:.3f}"
    return value if math.isnan(estimate.low) else f"{value} [{estimate.low:.3f}, {estimate.high:.3f}]"
