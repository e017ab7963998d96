"""A player that takes two words in turn, by the number of turns played."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from msgrpo_lab.tsmg.base import TextGame


@dataclass(frozen=True, slots=True)
class AlternatingPlayer:
    """`first` on even turns, `second` on odd ones; ignores the state."""

    first: str
    second: str

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:  # noqa: ARG002  the interface's
        """The word of this turn."""
        return self.second if game.steps % 2 else self.first
