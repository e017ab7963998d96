"""What samplers know of an episode beside its advantage: its return, its success, and the spread of its group.

An advantage that is normalised by its group's std no longer tells how much the group's returns differ, so samplers that
choose among groups or compare returns read them from `Credit.episode_return`. No credit rule has to fill it:
`with_outcomes` does, for any rule.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int

from msgrpo_lab.types import Credit, RolloutBatch

DECIMALS = 9
"""Returns and spreads that agree to so many decimals, in the unit of the reward, are equal [D]: 0.1 + 0.2 is 0.3. It is
the resolution of the metric `train/zero_std_groups`."""


def with_outcomes(batch: RolloutBatch, credit: Credit) -> Credit:
    """The same credit with `episode_return` and `episode_success` of the episodes it was assigned to.

    Raises:
        ValueError: `credit` is of another number of episodes.
    """
    if credit.episode_adv.shape != (len(batch.episodes),):
        raise ValueError(
            f"Credit.episode_adv has shape {credit.episode_adv.shape} and the rollout {len(batch.episodes)} episodes: "
            "give the credit of this rollout"
        )
    return replace(
        credit,
        episode_return=np.array([episode.ret for episode in batch.episodes]),
        episode_success=np.array([episode.success for episode in batch.episodes]),
    )


def returns_of(credit: Credit) -> Float[np.ndarray, " E"]:
    """Episode returns, to `DECIMALS` decimals, so that equal returns are equal.

    Raises:
        ValueError: the credit does not hold them, or one is not finite.
    """
    return_E = credit.episode_return
    if return_E is None:
        raise ValueError("Credit.episode_return=None: this sampler compares returns; pass the credit by with_outcomes")
    if not np.isfinite(return_E).all():
        bad = int(np.flatnonzero(~np.isfinite(return_E))[0])
        raise ValueError(f"Credit.episode_return[{bad}]={return_E[bad]} must be finite: check that episode's rewards")
    return np.round(return_E, DECIMALS)


def success_of(credit: Credit) -> Bool[np.ndarray, " E"]:
    """Whether each episode succeeded.

    Raises:
        ValueError: the credit does not hold it.
    """
    if credit.episode_success is None:
        raise ValueError("Credit.episode_success=None: this sampler needs outcomes; pass the credit by with_outcomes")
    return credit.episode_success


def group_spread(return_E: Float[np.ndarray, " E"], group_index: Int[np.ndarray, " E"]) -> Float[np.ndarray, " E"]:
    """Population std of the returns of each episode's group, to `DECIMALS` decimals; 0 in a group of equal returns."""
    _, group_E = np.unique(group_index, return_inverse=True)
    size_G = np.bincount(group_E)
    order_E = np.lexsort((return_E, group_E))  # summed in one order whatever the episodes' order
    sorted_E, group_sorted_E = return_E[order_E], group_E[order_E]
    centred_E = sorted_E - (np.bincount(group_sorted_E, sorted_E) / size_G)[group_sorted_E]
    std_G = np.sqrt(np.bincount(group_sorted_E, centred_E**2) / size_G)
    spread_E: Float[np.ndarray, " E"] = np.round(std_G, DECIMALS)[group_E]
    return spread_E
