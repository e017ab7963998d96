"""Agreement of estimated with exact advantages, on a batch and on resamples of its groups.

Groups are what is independent in a rollout, so batches are resampled group by group. A resample is a
row of weights, one a group; the batch itself is a row of ones. Every statistic here is computed for many rows at once.

Axes: N played turns, G groups, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

ROUNDING = 9
"""Advantages are compared after division by their root mean square, to so many decimals [D]: what differs by less is
tied, and what is smaller is 0. It is coarser than the rounding of dynamic programming and of group means."""


class Agreement(NamedTuple):
    """How estimated advantages agree with exact ones, for each resample; nan where a statistic is not defined."""

    spearman: Float[np.ndarray, " R"]
    """Correlation of the ranks, ties sharing their mean rank (Spearman 1904)."""
    pearson: Float[np.ndarray, " R"]
    sign_agreement: Float[np.ndarray, " R"]
    """Mean of sign(Â)·sign(A) over the turns with A ≠ 0: 1 is right everywhere, 0 is what a coin or no credit reaches,
    −1 is wrong everywhere. An estimate of 0 has no sign, and is neither right nor wrong [D]."""
    wrong_sign: Float[np.ndarray, " R"]
    """Share of the turns with A ≠ 0 whose credit has the other sign; a credit of 0 is not among them."""
    bias: Float[np.ndarray, " R"]
    """Mean of Â/rms(Â) − A/rms(A): what is paid or charged for nothing but having taken a turn, in units of a typical
    credit. The mean of A itself is 0 but for chance."""


def unit_scale(value_N: Float[np.ndarray, " N"], weight_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Values divided by their root mean square, rounded to `ROUNDING` decimals; zeros stay zeros."""
    total = float(weight_N.sum())
    scale = float(np.sqrt((weight_N * value_N**2).sum() / total)) if total > 0 else 0.0
    return np.round(value_N / scale, ROUNDING) if scale > 0 else np.zeros_like(value_N)


def agreement(
    estimate_N: Float[np.ndarray, " N"],
    exact_N: Float[np.ndarray, " N"],
    weight_N: Float[np.ndarray, " N"],
    group_N: Int[np.ndarray, " N"],
    times_RG: Float[np.ndarray, "R G"],
) -> Agreement:
    """Agreement of two advantages a turn, whatever their units.

    Args:
        estimate_N: what a credit rule gave each played turn.
        exact_N: A^π of the same turns.
        weight_N: how much each turn counts, at least 0: 1 for a whole rollout; under a sampler the sum of the loss
            weights that its episode was drawn with.
        group_N: group of each turn, 0 to G − 1.
        times_RG: how often each resample holds each group, whole numbers or not.
    """
    assert estimate_N.shape == exact_N.shape == weight_N.shape == group_N.shape
    x_N, y_N = unit_scale(estimate_N, weight_N), unit_scale(exact_N, weight_N)
    sign_N = np.sign(x_N) * np.sign(y_N)
    columns = (np.ones_like(x_N), x_N, y_N, x_N**2, y_N**2, x_N * y_N, y_N != 0, sign_N, sign_N < 0)
    sums_GC = np.stack([np.bincount(group_N, weight_N * c, times_RG.shape[1]) for c in columns], axis=1)
    count, x, y, xx, yy, xy, signed, product, wrong = (times_RG @ sums_GC).T
    with np.errstate(divide="ignore", invalid="ignore"):
        bias_R = np.where(xx > 0, x / np.sqrt(xx * count), 0.0) - np.where(yy > 0, y / np.sqrt(yy * count), 0.0)
        return Agreement(
            spearman=rank_correlation(x_N, y_N, weight_N, group_N, times_RG),
            pearson=correlation(count, x, y, xx, yy, xy),
            sign_agreement=product / signed,
            wrong_sign=wrong / signed,
            bias=np.where(count > 0, bias_R, np.nan),
        )


def correlation(
    count: Float[np.ndarray, " R"],
    x: Float[np.ndarray, " R"],
    y: Float[np.ndarray, " R"],
    xx: Float[np.ndarray, " R"],
    yy: Float[np.ndarray, " R"],
    xy: Float[np.ndarray, " R"],
) -> Float[np.ndarray, " R"]:
    """Pearson's correlation from weighted sums; nan where one of the two does not vary."""
    vary_x, vary_y = count * xx - x**2, count * yy - y**2
    varies = (vary_x > 1e-12 * count * xx) & (vary_y > 1e-12 * count * yy)
    scale = np.sqrt(np.where(varies, vary_x * vary_y, 1.0))
    return np.where(varies, np.clip((count * xy - x * y) / scale, -1.0, 1.0), np.nan)


def rank_correlation(
    x_N: Float[np.ndarray, " N"],
    y_N: Float[np.ndarray, " N"],
    weight_N: Float[np.ndarray, " N"],
    group_N: Int[np.ndarray, " N"],
    times_RG: Float[np.ndarray, "R G"],
) -> Float[np.ndarray, " R"]:
    """Spearman's correlation, each resample ranked by itself; nan where one of the two does not vary.

    A value's rank is the weight below it plus half of the weight at it, so ties share their mean rank.
    """
    # Turns of one group with the same two values are one pair: often a few hundred instead of ten thousand.
    rank_x_UR, of_x_N = midranks(x_N, weight_N, group_N, times_RG)
    rank_y_VR, of_y_N = midranks(y_N, weight_N, group_N, times_RG)
    key_N = (group_N * len(rank_x_UR) + of_x_N) * len(rank_y_VR) + of_y_N
    _, first_P, of_pair_N = np.unique(key_N, return_index=True, return_inverse=True)
    weight_PR = times_RG.T[group_N[first_P]] * np.bincount(of_pair_N, weight_N, len(first_P))[:, None]
    total_R = weight_PR.sum(axis=0)
    mean_R = 0.5 * total_R  # of midranks, whatever the ties
    x_PR, y_PR = rank_x_UR[of_x_N[first_P]] - mean_R, rank_y_VR[of_y_N[first_P]] - mean_R
    weighted_PR = weight_PR * x_PR
    xx_R, xy_R = (np.einsum("pr,pr->r", weighted_PR, other) for other in (x_PR, y_PR))
    yy_R = np.einsum("pr,pr->r", np.multiply(weight_PR, y_PR, out=weighted_PR), y_PR)
    smallest_R = 1e-12 * total_R**3
    varies = (xx_R > smallest_R) & (yy_R > smallest_R)
    scale_R = np.sqrt(np.where(varies, xx_R, 1.0)) * np.sqrt(np.where(varies, yy_R, 1.0))
    return np.where(varies, np.clip(xy_R / scale_R, -1.0, 1.0), np.nan)


def midranks(
    value_N: Float[np.ndarray, " N"],
    weight_N: Float[np.ndarray, " N"],
    group_N: Int[np.ndarray, " N"],
    times_RG: Float[np.ndarray, "R G"],
) -> tuple[Float[np.ndarray, "V R"], Int[np.ndarray, " N"]]:
    """Mean rank of each of the V distinct values in each resample, 0 to its total weight, and each turn's value."""
    distinct_V, of_N = np.unique(value_N, return_inverse=True)
    shape = (len(distinct_V), times_RG.shape[1])
    weight_VR: Float[np.ndarray, "V R"] = sparse.csr_array((weight_N, (of_N, group_N)), shape=shape) @ times_RG.T
    return np.cumsum(weight_VR, axis=0) - 0.5 * weight_VR, of_N


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
