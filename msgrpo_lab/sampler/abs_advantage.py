"""Absolute-advantage-weighted episode sampling, AAW (paper section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.sampler.base import check_num_episodes, check_pool, select
from msgrpo_lab.types import Credit, Selection


def abs_advantage_prob(
    adv_E: Float[np.ndarray, " E"], *, alpha: float = 1.0, floor: float = 0.0
) -> Float[np.ndarray, " E"]:
    """Single-draw probabilities p_i ∝ |Â_i|^α + floor (paper section 4); sums to 1.

    0⁰ = 1, so α = 0 is uniform exactly; if all weights are 0 the result is uniform. Computed in logarithms, so that no
    α overflows. α and the floor have no unit; advantages are taken as they come (normalised by `EpisodeReturn`).
    """
    if adv_E.ndim != 1:
        raise ValueError(f"adv_E has shape {adv_E.shape}: must be [E]")
    with np.errstate(divide="ignore"):
        log_power_E = alpha * np.log(np.abs(adv_E)) if alpha > 0.0 else np.zeros(adv_E.size)
        log_weight_E = np.logaddexp(log_power_E, np.log(floor))
    if np.isneginf(log_weight_E).all():
        return np.full(adv_E.size, 1.0 / adv_E.size)
    weight_E = np.exp(log_weight_E - log_weight_E.max())
    prob_E: Float[np.ndarray, " E"] = weight_E / weight_E.sum()
    return prob_E


@dataclass(frozen=True, kw_only=True)
class AbsAdvantage:
    """Episodes that are very good or very bad for their group are drawn more often: p_i ∝ |Â_i|^α + floor.

    Without replacement, where fewer than K episodes have a positive probability, all of those are drawn and the rest is
    filled uniformly from the others: `Uniform` and this train on the same number of episodes. Source: paper section 4.
    """

    num_episodes: int
    """K, episodes drawn from a rollout."""
    alpha: float = 1.0
    """Exponent, ≥ 0: 1 is our reading of the paper's rule, 0 is uniform [D]."""
    floor: float = 0.0
    """Added to every |Â|^α, ≥ 0: gives episodes with advantage 0 a chance [D]."""
    replace: bool = False
    """Draw with replacement [D]."""
    importance_weights: bool = False
    """Undo the weighting in the loss by 1/inclusion; off in the paper, where the weighting is the point [P]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_num_episodes(self.num_episodes)
        if not 0.0 <= self.alpha < float("inf"):
            raise ValueError(
                f"sampler.alpha={self.alpha}: must be finite and at least 0; 1 is our reading of the paper's rule"
            )
        if not 0.0 <= self.floor < float("inf"):
            raise ValueError(
                f"sampler.floor={self.floor}: must be finite and at least 0; 0 is our reading of the paper's rule"
            )

    def __call__(
        self, credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, rng: np.random.Generator
    ) -> Selection:
        """Draws `num_episodes` of the pool by |episode advantage|."""
        adv_E = check_pool(credit, group_index, num_episodes, replace=self.replace)
        return select(
            abs_advantage_prob(adv_E, alpha=self.alpha, floor=self.floor),
            num_episodes,
            rng,
            replace=self.replace,
            importance_weights=self.importance_weights,
        )
