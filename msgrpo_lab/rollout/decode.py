"""Free decoding, token by token, with every distinct text continued once.

Completions of equal prompts share one text until they draw different tokens, and a finished one leaves the batch: the
cost of a step is the number of *distinct unfinished* texts. A prompt met again under the same policy is not read again
while it is remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from msgrpo_lab.lap.decoding import decoding_logprobs
from msgrpo_lab.rollout.choice import distinct_prompts
from msgrpo_lab.rollout.draws import draw_grouped
from msgrpo_lab.rollout.engine import Settled
from msgrpo_lab.rollout.packed import PackedTexts, pack_prompts
from msgrpo_lab.rollout.reading import PromptMemory
from msgrpo_lab.types import Completion, Sampling

TEXTS_PER_CHUNK = 256
"""Texts projected onto the whole vocabulary at a time."""
ROW_COLUMNS = {"cpu": 2048}
"""Tokens that a row of packed texts may hold before it is cut in two: each new token looks at all of them."""
ROW_COLUMNS_ELSEWHERE = 16384
"""The same on accelerators, where the number of calls counts more."""
SMALL_ROW = 64
"""Fewer texts are not cut: reading the weights once more would cost more than the wide row does."""
MEMORY = 100_000
"""Decoded texts remembered at most."""


@dataclass(slots=True)
class _Written:
    """What N completions consist of so far."""

    tokens: Int[np.ndarray, "N C"]
    logprobs: Float[np.ndarray, "N C"]
    lengths: Int[np.ndarray, " N"]
    stopped: Bool[np.ndarray, " N"]


@dataclass(slots=True)
class _Group:
    """Completions that are continued together; `rows` is sorted by text."""

    texts: PackedTexts
    hidden: Float[torch.Tensor, "D width"]
    words: list[tuple[int, ...]]
    """Tokens written in each text after its prompt."""
    rows: Int[np.ndarray, " N"]
    text_of: Int[np.ndarray, " N"]


class FreeDecoder:
    """Samples completions over the whole vocabulary under one policy version.

    Args:
        memory: reads prompts under that policy version.
        version: the version.
    """

    def __init__(self, memory: PromptMemory, version: int) -> None:
        self.memory = memory
        self.policy = memory.reader.policy
        self.version = version
        self.computed_tokens = 0
        """Tokens computed behind the prompts, which the reader counts."""
        self.row_columns = ROW_COLUMNS.get(self.policy.device.type, ROW_COLUMNS_ELSEWHERE)
        self._texts: dict[tuple[int, ...], str] = {}
        self._ends = self.policy.end_token_ids

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Int[np.ndarray, " P"]],
        sampling: Sampling,
        uniforms: Float[np.ndarray, "N C"],
        settled: Settled | None,
    ) -> list[Completion]:
        """One completion a prompt. `uniforms` in [0, 1) decide: row n, column c draws token c of completion n.

        A step needs the drawn tokens on the host, which decides which texts there are next: one copy of two numbers a
        completion. Logits and distributions stay on the device.
        """
        distinct, prompt_of = distinct_prompts(prompts)
        written = _Written(
            tokens=np.full(uniforms.shape, -1, dtype=np.int64),
            logprobs=np.zeros(uniforms.shape, dtype=np.float32),
            lengths=np.zeros(len(prompts), dtype=np.int64),
            stopped=np.zeros(len(prompts), dtype=bool),
        )
        for chunk in self._chunks(distinct):
            stack = [self._begin([distinct[number] for number in chunk], chunk, prompt_of)]
            while stack:
                stack += self._step(stack.pop(), sampling, uniforms, written, settled)
        return self._completions(distinct, prompt_of, written)

    def _chunks(self, prompts: Sequence[Int[np.ndarray, " P"]]) -> list[list[int]]:
        """Prompts that are packed into one row each, in ascending length."""
        chunks: list[list[int]] = []
        columns = 0
        for number in sorted(range(len(prompts)), key=lambda number: len(prompts[number])):
            columns += len(prompts[number])
            if not chunks or columns > self.row_columns:
                chunks.append([])
                columns = len(prompts[number])
            chunks[-1].append(number)
        return chunks

    def _begin(
        self, prompts: Sequence[Int[np.ndarray, " P"]], numbers: Sequence[int], prompt_of: Int[np.ndarray, " N"]
    ) -> _Group:
        states = self.memory.states(prompts)
        members = [np.flatnonzero(prompt_of == number) for number in numbers]
        return _Group(
            texts=pack_prompts(self.policy, self.memory.reader.prefix, states),
            hidden=torch.stack([state.hidden for state in states]),
            words=[()] * len(prompts),
            rows=np.concatenate(members),
            text_of=np.repeat(np.arange(len(prompts)), [len(rows) for rows in members]),
        )

    def _step(
        self,
        group: _Group,
        sampling: Sampling,
        uniforms: Float[np.ndarray, "N C"],
        written: _Written,
        settled: Settled | None,
    ) -> list[_Group]:
        """Draws one token a completion; returns the group that goes on, cut in two if it has become too wide."""
        place = len(group.words[0])
        drawn, logprobs = self._draw(group, sampling, uniforms[:, place])
        written.tokens[group.rows, place] = drawn
        written.logprobs[group.rows, place] = logprobs
        written.lengths[group.rows] = place + 1
        pairs, text_of = np.unique(np.stack([group.text_of, drawn], axis=1), axis=0, return_inverse=True)
        text_of = text_of.ravel()
        words = [(*group.words[parent], token) for parent, token in pairs.tolist()]
        over = np.array([self._is_over(word, sampling, settled) for word in words])
        written.stopped[group.rows] = over[text_of]
        if over.all() or place + 1 == uniforms.shape[1]:
            return []
        kept = np.flatnonzero(~over)
        number_of = np.cumsum(~over) - 1
        rows, text_of = group.rows[~over[text_of]], number_of[text_of[~over[text_of]]]
        by_text = np.argsort(text_of, kind="stable")
        self.computed_tokens += len(kept)
        following = _Group(
            texts=group.texts,
            hidden=group.texts.extend(parents=pairs[kept, 0], token_ids=pairs[kept, 1]),
            words=[words[number] for number in kept.tolist()],
            rows=rows[by_text],
            text_of=text_of[by_text],
        )
        return self._cut(following)

    def _cut(self, group: _Group) -> list[_Group]:
        """The group, or its two halves where its row has become too wide."""
        count = len(group.words)
        if group.texts.columns <= self.row_columns or count < 2 * SMALL_ROW:
            return [group]
        halves = []
        for texts in np.array_split(np.arange(count), 2):
            first, last = group.text_of.searchsorted((texts[0], texts[-1] + 1))
            halves.append(
                _Group(
                    texts=group.texts.part(texts),
                    hidden=group.hidden[int(texts[0]) : int(texts[-1]) + 1],
                    words=group.words[texts[0] : texts[-1] + 1],
                    rows=group.rows[first:last],
                    text_of=group.text_of[first:last] - texts[0],
                )
            )
        return halves

    def _draw(
        self, group: _Group, sampling: Sampling, uniforms: Float[np.ndarray, " N"]
    ) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """A token a completion and its log-probability, a bounded number of texts at a time."""
        weight = self.policy.output_weight(None)
        parts = []
        for start in range(0, len(group.words), TEXTS_PER_CHUNK):
            first, last = group.text_of.searchsorted((start, start + TEXTS_PER_CHUNK))
            logits = self.policy.project(group.hidden[start : start + TEXTS_PER_CHUNK], weight)
            logprobs = decoding_logprobs(logits, sampling)
            text_of, rows = group.text_of[first:last] - start, group.rows[first:last]
            parts.append(draw_grouped(logprobs, text_of, uniforms[rows], sampling.greedy))
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _is_over(self, word: tuple[int, ...], sampling: Sampling, settled: Settled | None) -> bool:
        """Whether a completion ends with these tokens. Every distinct one is decoded once."""
        if word[-1] in self._ends:
            return True
        if not sampling.stop and settled is None:
            return False
        text = self._text(word)
        return any(stop in text for stop in sampling.stop) or (settled is not None and settled(text))

    def _text(self, word: tuple[int, ...]) -> str:
        text = self._texts.get(word)
        if text is None:
            if len(self._texts) >= MEMORY:
                self._texts.clear()
            text = self._texts[word] = self.policy.tokenizer.decode(list(word), skip_special_tokens=True)
        return text

    def _completions(
        self, distinct: Sequence[Int[np.ndarray, " P"]], prompt_of: Int[np.ndarray, " N"], written: _Written
    ) -> list[Completion]:
        """Equal completions of one prompt are one object."""
        made: dict[tuple[int, tuple[int, ...]], Completion] = {}
        completions = []
        for row, (prompt, length) in enumerate(zip(prompt_of.tolist(), written.lengths.tolist(), strict=True)):
            word = tuple(written.tokens[row, :length].tolist())
            if (prompt, word) not in made:
                made[prompt, word] = Completion(
                    prompt_ids=distinct[prompt],
                    token_ids=written.tokens[row, :length].copy(),
                    logprobs=written.logprobs[row, :length].copy(),
                    text=self._text(word),
                    finish_reason="stop" if written.stopped[row] else "length",
                    policy_version=self.version,
                )
            completions.append(made[prompt, word])
        return completions
