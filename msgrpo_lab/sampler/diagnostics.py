"""The bias a sampler introduces, as numbers for the log (design rule 7)."""

from __future__ import annotations

import numpy as np

from msgrpo_lab.types import Credit, Selection


def diagnose(credit: Credit, selection: Selection) -> dict[str, float]:
    """What a draw did to the pool it came from.

    - `sampler/ess`: effective sample size of the inclusion probabilities as a share of the pool,
      (Σ_i π_i)² / (E Σ_i π_i²) in [1/E, 1] (Kish 1965); 1 means that all episodes are equally likely to be trained on.
    - `sampler/inclusion_bias`: mean advantage of the drawn episodes − mean advantage of the pool.
    - `sampler/mean_advantage`: mean of weight · advantage over the drawn episodes, the mean that the loss sees; it is
      the drawn episodes' mean advantage unless importance weights are on.
    - `sampler/inclusion_min`, `sampler/inclusion_max`: the extremes of π_i, the expected number of times drawn.
    - `sampler/drawn_zero_advantage_share`: share of the drawn episodes with advantage exactly 0, which no policy
      gradient comes from.

    Raises:
        ValueError: `credit` and `selection` speak of different numbers of episodes.
    """
    adv_E, pi_E = credit.episode_adv, selection.inclusion
    if adv_E.shape != pi_E.shape:
        raise ValueError(f"Credit.episode_adv {adv_E.shape} and Selection.inclusion {pi_E.shape} must both be [E]")
    drawn_K = adv_E[selection.index]
    return {
        "sampler/ess": float(pi_E.sum() ** 2 / (pi_E.size * np.square(pi_E).sum())),
        "sampler/inclusion_bias": float(drawn_K.mean() - adv_E.mean()),
        "sampler/mean_advantage": float((selection.weight * drawn_K).mean()),
        "sampler/inclusion_min": float(pi_E.min()),
        "sampler/inclusion_max": float(pi_E.max()),
        "sampler/drawn_zero_advantage_share": float((drawn_K == 0.0).mean()),
    }
