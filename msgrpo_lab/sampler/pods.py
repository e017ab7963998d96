"""PODS: the max-variance subset of each group (Xu et al. 2025, arXiv 2504.13818).

Of n returns, a subset of m with the largest variance is made of the a smallest and the m − a largest for some a (the
paper's theorem), so trying all a finds it. What differs from the paper:

- The paper normalises advantages within the chosen subset; here credit is assigned before drawing, from the whole
  group, as under every sampler [D].
- The K episodes are shared out over the groups in proportion to their size; where that is not whole, a group's share is
  rounded down or up at random [D].
- Where several subsets have the largest variance, one of them is drawn: the distinct sets of returns alike, and equal
  returns alike [D]. So the inclusion probabilities are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.sampler.base import check_num_episodes, check_pool, returns_of, weigh
from msgrpo_lab.sampler.strata import whole_quotas
from msgrpo_lab.types import Credit, Selection

TIE = 1e-9
"""Variances that differ by less than this share of the largest are equal [D]."""

Scope = Literal["group", "pool"]


def max_variance_lows(sorted_N: Float[np.ndarray, " N"], size: int) -> Int[np.ndarray, " A"]:
    """All a for which the a smallest and `size` − a largest of ascending values are a subset of largest variance.

    arXiv 2504.13818: an optimal subset of this form exists. Of several a that give the same values, the least stands.
    """
    scale = float(np.abs(sorted_N - sorted_N.mean()).max())
    unit_N = (sorted_N - sorted_N.mean()) / scale if scale > 0.0 else np.zeros_like(sorted_N)
    total_M, square_M = (np.concatenate([[0.0], np.cumsum(values)]) for values in (unit_N, unit_N**2))
    low_A = np.arange(size + 1)
    start_A = sorted_N.size - size + low_A
    mean_A = (total_M[low_A] + total_M[-1] - total_M[start_A]) / size
    variance_A = (square_M[low_A] + square_M[-1] - square_M[start_A]) / size - mean_A**2
    # From a − 1 to a, one of the low values comes in and one of the high ones goes: nothing changes if they are equal.
    other_A = np.concatenate([[True], sorted_N[:size] != sorted_N[sorted_N.size - size :]])
    return np.flatnonzero((variance_A >= variance_A.max() - TIE) & other_A)


def max_variance_inclusion(value_N: Float[np.ndarray, " N"], size: int) -> Float[np.ndarray, " N"]:
    """Probability of each value to be in the max-variance subset of `size` values; ties share. Sums to `size`."""
    if size == 0:
        return np.zeros(value_N.size)
    sorted_N = np.sort(value_N)
    low_A = max_variance_lows(sorted_N, size)
    position_N = np.arange(value_N.size)
    taken_AN = (position_N < low_A[:, None]) | (position_N >= value_N.size - size + low_A[:, None])
    _, class_N = np.unique(sorted_N, return_inverse=True)
    share_C = np.bincount(class_N, taken_AN.mean(axis=0)) / np.bincount(class_N)
    inclusion_N: Float[np.ndarray, " N"] = share_C[np.unique(value_N, return_inverse=True)[1]]
    return inclusion_N


def draw_max_variance(value_N: Float[np.ndarray, " N"], size: int, rng: np.random.Generator) -> Int[np.ndarray, " M"]:
    """One max-variance subset of `size` values, as positions; among several, as `max_variance_inclusion` has it."""
    order_N = np.lexsort((rng.uniform(size=value_N.size), value_N))
    if size == 0:
        return order_N[:0]
    low = int(rng.choice(max_variance_lows(value_N[order_N], size)))
    return np.concatenate([order_N[:low], order_N[value_N.size - size + low :]])


@dataclass(frozen=True, kw_only=True)
class PODS:
    """The K episodes whose returns vary most, group by group. Without replacement: a subset holds no episode twice."""

    num_episodes: int
    """K, episodes drawn from a rollout."""
    scope: Scope = "group"
    """Where the variance is taken: within each group, as in the paper, or over the whole rollout [D]."""
    importance_weights: bool = False
    """Undo the choice in the loss by 1/inclusion, for the episodes that can be chosen at all [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_num_episodes(self.num_episodes)
        if self.scope not in get_args(Scope):
            raise ValueError(f"sampler.scope={self.scope!r}: is unknown; use one of {', '.join(get_args(Scope))}")

    def __call__(
        self, credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, rng: np.random.Generator
    ) -> Selection:
        """Draws `num_episodes` of the pool by the variance of their returns."""
        pool = check_pool(credit, group_index, num_episodes, replace=False).size
        return_E = returns_of(credit)
        _, group_E = np.unique(group_index if self.scope == "group" else np.zeros(pool), return_inverse=True)
        quota_G = num_episodes * np.bincount(group_E) / pool
        count_G = whole_quotas(quota_G, rng)
        inclusion_E, drawn = np.zeros(pool), []
        for group, (quota, count) in enumerate(zip(quota_G.tolist(), count_G.tolist(), strict=True)):
            member_N = np.flatnonzero(group_E == group)
            value_N = return_E[member_N]
            low = int(np.floor(quota + 1e-9))
            part = max(quota - low, 0.0)
            inclusion_E[member_N] = (1.0 - part) * max_variance_inclusion(value_N, low)
            if part > 1e-9:
                inclusion_E[member_N] += part * max_variance_inclusion(value_N, low + 1)
            drawn.append(member_N[draw_max_variance(value_N, count, rng)])
        index_K = rng.permutation(np.concatenate(drawn))
        return weigh(index_K, inclusion_E / num_episodes, inclusion_E, importance_weights=self.importance_weights)
