"""Who owns which random draw. Every consumer has a stream of its own; nothing touches a global generator.

A stream is a function of the run's seed, its name and the epoch, so any epoch's draws can be made again without having
made those before it: what a resumed run needs.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np

Stream = Literal[
    "env_seeds", "members", "engine", "sampler", "data_order", "evaluation", "reference", "refill", "truth"
]

_STREAMS: dict[Stream, int] = {
    "env_seeds": 0,
    "members": 1,
    "engine": 2,
    "sampler": 3,
    "data_order": 4,
    "evaluation": 5,
    "reference": 6,
    "refill": 7,
    "truth": 8,
}

FIRST_HELD_OUT_SEED = 10_000_000
"""Environment seeds from here on are held out for evaluation; training draws below it. The two never meet."""


def generator(seed: int, stream: Stream, epoch: int = 0) -> np.random.Generator:
    """The generator of `stream` for one epoch of the run with this seed."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAMS[stream], epoch)))


def episode_generators(seed: int, stream: Stream, epoch: int, count: int) -> list[np.random.Generator]:
    """One independent generator an episode, for one epoch of the run with this seed.

    Episode i's draws depend on seed, stream, epoch and i alone, not on how many episodes there are or which are alive.
    All share one 128-bit Philox key; episode i owns the 2¹⁹² counters whose highest word is i, so no two ever overlap.
    """
    key = np.random.SeedSequence(seed, spawn_key=(_STREAMS[stream], epoch)).generate_state(2, np.uint64)
    philox = partial(np.random.Philox, key=key)
    return [np.random.Generator(philox(counter=[0, 0, 0, episode])) for episode in range(count)]


def refill_seed(seed: int, epoch: int, refill: int) -> int:
    """The seed that every draw of an epoch's refill number `refill` ≥ 1 is made with, as the first rollout's are with
    the run's: a function of its arguments alone, so a resumed run refills alike.
    """
    return int(generator(seed, "refill", epoch).integers(2**63, size=refill, dtype=np.uint64)[-1])


def held_out_seeds(count: int) -> list[int]:
    """Environment seeds of the evaluation episodes: the same for every run, whatever its seed."""
    return list(range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + count))
