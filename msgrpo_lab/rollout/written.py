"""What completions consist of so far, and when one is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from msgrpo_lab.engines.base import Settled
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.types import Completion, Sampling

MEMORY = 100_000
"""Decoded texts remembered at most."""

Word = tuple[int, ...]
"""Tokens of a completion."""


class Words:
    """Decodes every distinct sequence of tokens once."""

    def __init__(self, policy: LanguagePolicy) -> None:
        self._tokenizer = policy.tokenizer
        self._ends = policy.end_token_ids
        self._texts: dict[Word, str] = {}

    def text(self, word: Word) -> str:
        """Decoded, without special tokens."""
        text = self._texts.get(word)
        if text is None:
            if len(self._texts) >= MEMORY:
                self._texts.clear()
            text = self._texts[word] = self._tokenizer.decode(list(word), skip_special_tokens=True)
        return text

    def is_over(self, word: Word, sampling: Sampling, settled: Settled | None) -> bool:
        """Whether a completion ends with these tokens."""
        if word[-1] in self._ends:
            return True
        if not sampling.stop and settled is None:
            return False
        text = self.text(word)
        return any(stop in text for stop in sampling.stop) or (settled is not None and settled(text))


@dataclass(slots=True)
class Written:
    """What N completions of at most C tokens consist of so far."""

    tokens: Int[np.ndarray, "N C"]
    logprobs: Float[np.ndarray, "N C"]
    lengths: Int[np.ndarray, " N"]
    stopped: Bool[np.ndarray, " N"]

    @classmethod
    def nothing(cls, shape: tuple[int, ...]) -> Written:
        """Before the first token."""
        return cls(
            tokens=np.full(shape, -1, dtype=np.int64),
            logprobs=np.zeros(shape, dtype=np.float32),
            lengths=np.zeros(shape[0], dtype=np.int64),
            stopped=np.zeros(shape[0], dtype=bool),
        )

    def completions(
        self, prompts: Sequence[Int[np.ndarray, " P"]], prompt_of: Int[np.ndarray, " N"], words: Words, version: int
    ) -> list[Completion]:
        """One each; equal completions of one prompt are one object."""
        made: dict[tuple[int, Word], Completion] = {}
        completions = []
        for row, (prompt, length) in enumerate(zip(prompt_of.tolist(), self.lengths.tolist(), strict=True)):
            word = tuple(self.tokens[row, :length].tolist())
            if (prompt, word) not in made:
                made[prompt, word] = Completion(
                    prompt_ids=prompts[prompt],
                    token_ids=self.tokens[row, :length].copy(),
                    logprobs=self.logprobs[row, :length].copy(),
                    text=words.text(word),
                    finish_reason="stop" if self.stopped[row] else "length",
                    policy_version=version,
                )
            completions.append(made[prompt, word])
        return completions
