"""The in-process engine: the policy being trained completes the prompts itself, on its own device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.rollout.choice import ChoiceDecoder
from msgrpo_lab.rollout.decode import FreeDecoder
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Completion, Sampling


class HFEngine:
    """Completes prompts with the Hugging Face model that is being trained.

    Equal prompts are computed once; with constrained decoding a prompt is computed once between two calls of `sync`.

    Args:
        token_budget: padded prompt tokens of one forward pass at most.
    """

    samples_policy = True

    def __init__(self, *, token_budget: int = 8192) -> None:
        if token_budget < 1:
            raise ValueError(f"engine.token_budget={token_budget}: must be at least 1")
        self.token_budget = token_budget
        self._choice: ChoiceDecoder | None = None
        self._free: FreeDecoder | None = None

    def sync(self, policy: LanguagePolicy, version: int) -> None:
        """See `RolloutEngine.sync`. All that is remembered is dropped, even of the same policy and version.

        Which prompts a forward pass holds moves the last bits of its logits. So that a rollout is the same to the bit
        whether or not an evaluation (or a restart) came before it, it never goes on from what another one computed.
        """
        self._choice = ChoiceDecoder(policy, version, self.token_budget)
        self._free = FreeDecoder(policy, version, self.token_budget)

    def observe(self, games: Sequence[TextGame]) -> None:
        """A language model reads its prompt and nothing else."""

    def generate(
        self, prompts: Sequence[Int[np.ndarray, " P"]], sampling: Sampling, rng: np.random.Generator
    ) -> list[Completion]:
        """See `RolloutEngine.generate`. Draws one uniform number a completion and token, whatever is needed of them."""
        if self._choice is None or self._free is None:
            raise RuntimeError("engine: call sync() before generate()")
        if not prompts:
            return []
        if sampling.choices is None:
            return self._free.generate(prompts, sampling, rng.random((len(prompts), sampling.max_new_tokens)))
        longest = max(map(len, sampling.choices))
        return self._choice.generate(prompts, sampling, rng.random((len(prompts), longest)))

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the model since the last `sync`."""
        if self._choice is None or self._free is None:
            return 0
        return self._choice.computed_tokens + self._free.computed_tokens

    def close(self) -> None:
        """Drops the policy and all that is remembered of it."""
        self._choice = self._free = None
