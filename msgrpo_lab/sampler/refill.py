"""Refilling: a sampler may ask for further episodes before it draws.

The data module then collects one more rollout by the same policy, merges it with what there is, assigns credit anew,
and asks again. Every refill has generators of its own (`seeding.refill_seed`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.types import Credit, RolloutBatch


@runtime_checkable
class Refilling(Protocol):
    """A sampler that may want more episodes than one rollout gives."""

    def episodes_wanted(
        self, credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, refills: int
    ) -> int:
        """How many episodes to collect in addition, after `refills` refills; 0 ends it, and must come in the end.

        Args:
            credit: of all episodes so far, with outcomes.
            group_index: of all episodes so far.
            num_episodes: K, how many are to be drawn.
            refills: how often there has been a refill in this epoch.
        """


def merge_rollouts(first: RolloutBatch, second: RolloutBatch) -> RolloutBatch:
    """The episodes of both, in order; the groups of `second` get numbers behind those of `first`.

    `exact_adv` is kept where both have it, padded to the longer.
    """
    offset = int(first.group_index.max()) + 1 - int(second.group_index.min())
    moved = tuple(replace(episode, group_id=episode.group_id + offset) for episode in second.episodes)
    exact_ET = None
    if first.exact_adv is not None and second.exact_adv is not None:
        turns = max(first.exact_adv.shape[1], second.exact_adv.shape[1])
        exact_ET = np.concatenate([_padded(first.exact_adv, turns), _padded(second.exact_adv, turns)])
    return RolloutBatch(
        episodes=first.episodes + moved,
        group_index=np.concatenate([first.group_index, second.group_index + offset]),
        exact_adv=exact_ET,
    )


def _padded(value_ET: Float[np.ndarray, "E T"], turns: int) -> Float[np.ndarray, "E U"]:
    return np.pad(value_ET, ((0, 0), (0, turns - value_ET.shape[1])))
