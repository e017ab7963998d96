"""An engine that shares no work between prompts: slow, and right to compare a fast one with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from msgrpo_lab.engines.base import Settled, check_lengths
from msgrpo_lab.engines.hf.engine import HFEngine
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Completion, Sampling


class OneByOneEngine:
    """Completes each prompt in a call of its own, and remembers nothing in between."""

    samples_policy = True

    def __init__(self) -> None:
        self._policy: LanguagePolicy | None = None
        self._version = 0

    def sync(self, policy: LanguagePolicy, version: int) -> None:
        """See `RolloutEngine.sync`."""
        self._policy, self._version = policy, version

    def observe(self, games: Sequence[TextGame]) -> None:
        """A language model reads its prompt and nothing else."""

    def generate(
        self,
        prompts: Sequence[Int[np.ndarray, " P"]],
        sampling: Sampling,
        rngs: Sequence[np.random.Generator],
        settled: Settled | None = None,
    ) -> list[Completion]:
        """See `RolloutEngine.generate`."""
        if self._policy is None:
            raise RuntimeError("engine: call sync() before generate()")
        check_lengths(prompts, rngs)
        completions = []
        for prompt, rng in zip(prompts, rngs, strict=True):
            engine = HFEngine()
            engine.sync(self._policy, self._version)
            completions += engine.generate([prompt], sampling, [rng], settled)
        return completions

    def metrics(self) -> Mapping[str, float]:
        """Nothing to say."""
        return {}

    def close(self) -> None:
        """Lets go of the policy."""
        self._policy = None
