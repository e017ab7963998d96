"""Maps that training never meets: a split of initial states by a hash, so that every run leaves out the same ones.

Held-out *seeds* alone do not do it: small maps repeat, and a held-out seed is mostly a map that training has met.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Int

from msgrpo_lab.seeding import FIRST_HELD_OUT_SEED
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import RolloutBatch

Maps = Literal["all", "unseen"]
"""`all`: training may meet any map; `unseen`: one map in `UNSEEN` is kept out of training and evaluated apart."""
UNSEEN = 5
TRIES = 1000
"""Seeds that are looked at for each one that is wanted, before a scenario is said to have too few maps."""


class MapSplit:
    """Tells the maps of one scenario apart.

    Args:
        make_game: makes a game of the scenario.
    """

    def __init__(self, make_game: Callable[[], TextGame]) -> None:
        self._game = make_game()
        self._known: dict[int, bool] = {}

    def is_unseen(self, seed: int) -> bool:
        """Whether the initial state of an environment seed is kept out of training."""
        found = self._known.get(seed)
        if found is None:
            self._game.reset(seed=seed)
            digest = hashlib.sha256(repr(self._game.state_key()).encode()).digest()
            found = self._known[seed] = int.from_bytes(digest[:8], "big") % UNSEEN == 0
        return found

    def training_seeds(self, rng: np.random.Generator, count: int) -> Int[np.ndarray, " G"]:
        """Environment seeds of maps that training may meet, the first ones that `rng` draws."""
        drawn = (int(seed) for _ in range(TRIES) for seed in rng.integers(FIRST_HELD_OUT_SEED, size=count))
        return np.array(_first((seed for seed in drawn if not self.is_unseen(seed)), count), dtype=np.int64)

    def unseen_seeds(self, count: int) -> list[int]:
        """The first held-out seeds whose maps training never meets: the same for every run."""
        seeds = range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + TRIES * count)
        return _first((seed for seed in seeds if self.is_unseen(seed)), count)


def prompt_digests(rollout: RolloutBatch) -> set[bytes]:
    """Eight bytes for each distinct prompt of a rollout."""
    prompts = {turn.completion.prompt_ids.tobytes() for episode in rollout.episodes for turn in episode.turns}
    return {hashlib.blake2b(prompt, digest_size=8).digest() for prompt in prompts}


def _first(seeds: Iterable[int] | Iterator[int], count: int) -> list[int]:
    found = [seed for seed, _ in zip(seeds, range(count), strict=False)]
    if len(found) < count:
        raise ValueError(
            "evaluation.maps=unseen: this scenario has too few maps to keep some out of training; set it to all, or "
            "make env.size larger"
        )
    return found
