"""Where a game's random draws come from, and how they are put back: seeded streams and snapshots."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

LAYOUT_STREAM = 0
"""Stream of a seed that lays out the initial state."""
DYNAMICS_STREAM = 1
"""Stream of a seed, one a group member, that decides what happens afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that decides how a game goes on. Opaque to callers, picklable."""

    settings: tuple[Hashable, ...]
    """Arguments of the game it was taken from."""
    seed: int
    member: int
    steps: int
    over: bool
    state: Any
    dynamics_state: Mapping[str, Any] | None
    """State of the generator of slips, other players and fallbacks; None if nothing was drawn yet."""
    reset_state: Mapping[str, Any]
    """State of gymnasium's own generator, which draws the seed of a `reset()` without one."""


def stream(seed: int, *key: int) -> np.random.Generator:
    """Independent generator of `seed` for `key`, apart from the one that draws gymnasium's maps from the same seed.

    A spawn key, not a longer list of entropy: `SeedSequence([seed, 0])` is the very stream of `SeedSequence(seed)`.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def generator_at(state: Mapping[str, Any]) -> np.random.Generator:
    """A generator that goes on from `state` of a PCG64."""
    bits = np.random.PCG64(0)
    bits.state = cast("Any", dict(state))
    return np.random.Generator(bits)
