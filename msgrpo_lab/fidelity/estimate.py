"""A statistic of a rollout with its error: over the groups that were met, and over the episodes that a sampler drew.

A resample draws the groups with replacement (the cluster bootstrap; Efron 1979, Field & Welsh 2007), but moves only a
part of the way there: weights 1 + c (times drawn − 1), and errors divided by c again (the exchangeably weighted
bootstrap; Præstgaard & Wellner 1993). Why not c = 1? A whole resample holds the noise of its groups again and again: a
noisy gradient is longer there by √2, its cosine with the exact one smaller and less scattered, and the error told would
be too small. Intervals are normal ones.

Axes: D draws of a sampler, R resamples a draw, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

DAMPING = 0.25
"""c: how far a resample goes from the batch itself towards the drawn groups [D]."""
Z95 = NormalDist().inv_cdf(0.975)
"""Half-width of a 95 % interval in standard errors."""


class Estimate(NamedTuple):
    """A number and its 95 % interval; nan where there is nothing to tell it from."""

    value: float
    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.high < 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Score:
    """One statistic, on each draw and on resampled groups of each draw."""

    point_D: Float[np.ndarray, " D"]  # noqa: N815  axis letters
    resampled_DR: Float[np.ndarray, "D R"]  # noqa: N815
    """Empty for what no resample changes."""
    bounds: tuple[float, float] = (-math.inf, math.inf)
    """What the statistic cannot leave; the interval is cut there."""

    @property
    def standard_error(self) -> float:
        """√(variance over resampled groups + variance over draws / D); nan with one group.

        The first is that of a single draw, so the error of the mean over draws is at most this.
        """
        draws, resamples = self.resampled_DR.shape
        over_groups = float(np.mean(_variances(self.resampled_DR))) if resamples else 0.0
        over_draws = float(self.point_D.var(ddof=1)) / draws if draws > 1 else 0.0
        return math.sqrt(over_groups / DAMPING**2 + over_draws)

    def estimate(self) -> Estimate:
        """The mean over the draws, and its interval."""
        value, half = float(self.point_D.mean()), Z95 * self.standard_error
        low, high = self.bounds
        # nan stays nan: min and max would drop it
        return Estimate(value, *(float(np.clip(end, low, high)) for end in (value - half, value + half)))

    def minus(self, other: Score) -> Score:
        """The difference of two statistics of the same draws and resamples, whose common noise cancels."""
        if self.resampled_DR.shape != other.resampled_DR.shape:
            raise ValueError(
                f"scores: {self.resampled_DR.shape} and {other.resampled_DR.shape} draws and resamples; compare what "
                "was measured on the same ones"
            )
        return Score(point_D=self.point_D - other.point_D, resampled_DR=self.resampled_DR - other.resampled_DR)


def _variances(resampled_DR: Float[np.ndarray, "D R"]) -> Float[np.ndarray, " D"]:
    """Variance over the resamples in which the statistic is defined; nan where fewer than two are."""
    defined_DR = np.isfinite(resampled_DR)
    count_D = defined_DR.sum(axis=1)
    filled_DR = np.where(defined_DR, resampled_DR, 0.0)
    mean_D = filled_DR.sum(axis=1) / np.maximum(count_D, 1)
    square_D = np.where(defined_DR, (filled_DR - mean_D[:, None]) ** 2, 0.0).sum(axis=1)
    return np.where(count_D > 1, square_D / np.maximum(count_D - 1, 1), np.nan)


def resample_groups(groups: int, resamples: int, rng: np.random.Generator) -> Float[np.ndarray, "R G"]:
    """The weight of each group in each resample; the batch itself is a row of ones.

    A batch of a single group cannot be resampled; its rows are nan, and so is every error that is made of them.
    """
    if groups < 2:
        return np.full((resamples, groups), np.nan)
    drawn_RG = rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples)
    return 1.0 + DAMPING * (drawn_RG - 1.0)
