"""Draws with a quota for each of several classes of episodes: inclusion probabilities are exact.

A *stratum* is a class within which episodes are drawn uniformly. *Tiers* are strata in order of preference: one is
drawn out before the next is touched, which is how a filter still gives exactly K episodes.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.sampler.base import select, weigh
from msgrpo_lab.types import Selection


def whole_quotas(quota_G: Float[np.ndarray, " G"], rng: np.random.Generator) -> Int[np.ndarray, " G"]:
    """Whole numbers with the given means: each quota rounded down or up, with the total of the quotas.

    Systematic sampling of the fractional parts in random order (Madow 1949): stratum g is rounded up with probability
    exactly frac(quota_g). The quotas must add up to a whole number.
    """
    whole_G = np.floor(quota_G + 1e-9).astype(np.int64)
    open_H = rng.permutation(np.flatnonzero(quota_G - whole_G > 1e-9))
    extra = round(float(quota_G.sum() - whole_G.sum()))
    if open_H.size:
        edge_H = np.cumsum((quota_G - whole_G)[open_H])
        edge_H[-1] = extra  # it is, to rounding
        whole_G[open_H] += np.diff(np.floor(edge_H + rng.uniform()).astype(np.int64), prepend=0)
    return whole_G


def draw_strata(
    stratum_E: Int[np.ndarray, " E"], count_G: Int[np.ndarray, " G"], rng: np.random.Generator
) -> Int[np.ndarray, " K"]:
    """`count_G[g]` of the episodes with `stratum_E == g`, uniformly and without replacement, in random order."""
    order_E = np.lexsort((rng.uniform(size=stratum_E.size), stratum_E))
    size_G = np.bincount(stratum_E, minlength=count_G.size)
    first_G = np.cumsum(size_G) - size_G
    place_E = np.arange(stratum_E.size) - first_G[stratum_E[order_E]]
    return rng.permutation(order_E[place_E < count_G[stratum_E[order_E]]])


def select_strata(
    stratum_E: Int[np.ndarray, " E"],
    quota_G: Float[np.ndarray, " G"],
    rng: np.random.Generator,
    *,
    importance_weights: bool,
) -> Selection:
    """Draws K = Σ quota episodes without replacement, on average `quota_G[g]` of stratum g: π_i = quota_g / size_g.

    Args:
        stratum_E: number of each episode's stratum.
        quota_G: expected number of draws from each stratum, at most its size; adds up to a whole number K.
        rng: decides the draw.
        importance_weights: weigh by (K/E) / π_i.
    """
    index_K = draw_strata(stratum_E, whole_quotas(quota_G, rng), rng)
    size_G = np.bincount(stratum_E, minlength=quota_G.size)
    inclusion_E = (quota_G / np.maximum(size_G, 1))[stratum_E]
    return weigh(index_K, inclusion_E / index_K.size, inclusion_E, importance_weights=importance_weights)


def select_tiers(
    tier_E: Int[np.ndarray, " E"],
    num_episodes: int,
    rng: np.random.Generator,
    *,
    replace: bool,
    importance_weights: bool,
) -> Selection:
    """Draws K episodes uniformly from the lowest tier; where it holds fewer, all of it and the rest from the next.

    With replacement the lowest tier alone is drawn from, whatever its size. Only the order of the tiers counts, so that
    a tier that nobody is in is skipped.
    """
    _, stratum_E = np.unique(tier_E, return_inverse=True)
    if replace:
        best_E = stratum_E == 0
        prob_E = best_E / best_E.sum()
        return select(prob_E, num_episodes, rng, replace=True, importance_weights=importance_weights)
    size_G = np.bincount(stratum_E)
    before_G = np.cumsum(size_G) - size_G
    quota_G = np.clip(num_episodes - before_G, 0, size_G).astype(np.float64)
    return select_strata(stratum_E, quota_G, rng, importance_weights=importance_weights)
