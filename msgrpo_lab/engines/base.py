"""What a rollout engine is: something that completes prompts, and can be told of a new policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Completion, Sampling

Settled = Callable[[str], bool]
"""Whether a completion's action can no longer change, whatever would be written after this text."""


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
        self,
        prompts: Sequence[Int[np.ndarray, " P"]],
        sampling: Sampling,
        rngs: Sequence[np.random.Generator],
        settled: Settled | None = None,
    ) -> list[Completion]:
        """One completion a prompt, in order; `rngs` holds the generator of each prompt's episode.

        A completion depends on its own generator, its prompt and the policy; on the other prompts no more than rounding
        does. Greedy decoding draws nothing. Free decoding ends a completion as soon as its text is `settled`.
        """
        ...

    def metrics(self) -> Mapping[str, float]:
        """What the engine did since the last `sync`, by name; without a prefix."""
        ...

    def close(self) -> None:
        """Lets go of what the engine holds."""
        ...


def draw_uniforms(
    rngs: Sequence[np.random.Generator], tokens: int, sampling: Sampling
) -> Float[np.ndarray, "N tokens"]:
    """Uniform numbers in [0, 1), one a token, each row from its own generator; zeros, undrawn, if greedy.

    Every generator is moved by `tokens` numbers, whatever is needed of them, so that one turn's draws do not depend on
    how long the answer of an earlier one was.
    """
    if sampling.greedy:
        return np.zeros((len(rngs), tokens))
    uniforms = np.empty((len(rngs), tokens))
    for row, rng in zip(uniforms, rngs, strict=True):
        rng.random(out=row)
    return uniforms


def check_lengths(prompts: Sequence[Int[np.ndarray, " P"]], rngs: Sequence[np.random.Generator]) -> None:
    """Raises `ValueError` unless there is one generator a prompt."""
    if len(prompts) != len(rngs):
        raise ValueError(f"rngs: {len(rngs)} generators for {len(prompts)} prompts; give one an episode")
