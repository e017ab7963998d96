"""Rollouts without a model: a player that picks legal actions at random and writes answers of a given length.

Episodes, prompts and samples are the real ones of the configuration, so that what a run shares between them is counted
and not guessed. What an answer says is unknown before a model writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from msgrpo_lab.engines.base import Settled, check_lengths
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Completion, Sampling


class RandomAnswers:
    """A rollout engine whose answers name a legal action, each as often as any other.

    Args:
        answer_tokens: tokens of an answer under free decoding.
        vocabulary: each of them is a random number below it, or below k under top-k: the more there are to choose from,
            the less often two answers begin alike.
    """

    samples_policy = False

    def __init__(self, answer_tokens: int, vocabulary: int) -> None:
        self.answer_tokens = answer_tokens
        self.vocabulary = vocabulary
        self._games: Sequence[TextGame] = ()

    def sync(self, policy: LanguagePolicy, version: int) -> None:
        """There is no policy."""

    def observe(self, games: Sequence[TextGame]) -> None:
        """See `RolloutEngine.observe`."""
        self._games = games

    def generate(
        self,
        prompts: Sequence[Int[np.ndarray, " P"]],
        sampling: Sampling,
        rngs: Sequence[np.random.Generator],
        settled: Settled | None = None,  # noqa: ARG002
    ) -> list[Completion]:
        """A random legal action in each of the games shown last."""
        check_lengths(prompts, rngs)
        completions = []
        for prompt, game, rng in zip(prompts, self._games, rngs, strict=True):
            number = int(rng.integers(len(game.legal_actions)))
            if sampling.choices is None:
                tokens = rng.integers(min(self.vocabulary, sampling.top_k or self.vocabulary), size=self.answer_tokens)
            else:
                tokens = np.array(sampling.choices[number], dtype=np.int64)
            completions.append(
                Completion(
                    prompt_ids=prompt,
                    token_ids=tokens,
                    logprobs=np.zeros(len(tokens), dtype=np.float32),
                    # Read alike by the parsers of words and of tags.
                    text=f"<action>{game.legal_actions[number]}</action>",
                    finish_reason="stop",
                    policy_version=0,
                )
            )
        return completions

    def metrics(self) -> Mapping[str, float]:
        """Nothing was computed."""
        return {}

    def close(self) -> None:
        """Lets go of the games."""
        self._games = ()
