"""What a rollout engine is: something that completes prompts, and can be told of a new policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int

from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Completion, Sampling


class RolloutEngine(Protocol):
    """Completes prompts.

    The log-probabilities it returns are those of the tokens it sampled, under the distribution it sampled them from;
    the conformance tests compare them with the policy's teacher-forced ones.
    """

    samples_policy: bool
    """Whether completions are the synced policy's own, so that it can be trained on them."""

    def sync(self, policy: LanguagePolicy, version: int) -> None:
        """From now on complete with this policy, as it is now. `version` counts optimiser updates."""
        ...

    def observe(self, games: Sequence[TextGame]) -> None:
        """Shows the games whose prompts come next, in their order. For players that look at the state itself."""
        ...

    def generate(
        self, prompts: Sequence[Int[np.ndarray, " P"]], sampling: Sampling, rng: np.random.Generator
    ) -> list[Completion]:
        """One completion a prompt, in order; equal prompts get independent draws.

        Draws depend on `rng`, the prompts and the policy; on batching inside the engine no more than rounding does.
        """
        ...

    def close(self) -> None:
        """Lets go of what the engine holds."""
        ...
