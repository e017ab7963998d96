"""Free decoding, token by token, with every distinct text continued once.

Completions of equal prompts share one text until they draw different tokens, and a finished one leaves the batch: the
cost of a step is the number of *distinct unfinished* texts. A prompt met again under the same policy is not read again
while it is remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from msgrpo_lab.lap.decoding import decoding_logprobs
from msgrpo_lab.rollout.choice import distinct_prompts
from msgrpo_lab.rollout.draws import draw_grouped
from msgrpo_lab.rollout.engine import Settled
from msgrpo_lab.rollout.packed import PackedTexts, extend, pack_prompts
from msgrpo_lab.rollout.reading import PromptMemory
from msgrpo_lab.rollout.written import Words, Written
from msgrpo_lab.types import Completion, Sampling

TEXTS_PER_CHUNK = 256
"""Texts projected onto the whole vocabulary at a time."""
DRAWN_TOGETHER = {"cpu": 16}
"""Texts whose distributions are made at a time: so few stay in a core's cache."""
ROW_COLUMNS = {"cpu": 1024}
"""Tokens that a row of packed texts may hold before it is cut in two: each new token looks at all of them."""
ROW_COLUMNS_ELSEWHERE = 16384
"""The same on accelerators, where the number of operations counts more."""
SMALL_ROW = 16
"""Fewer texts are not cut: a row more costs more than the wide row does."""
WAVE_TOKENS = {"cpu": 16384}
"""Prompt tokens that are continued side by side; their keys and values are held meanwhile."""
WAVE_TOKENS_ELSEWHERE = 131072
"""The same on accelerators."""


@dataclass(slots=True)
class _Group:
    """Completions whose texts stand in one row; `rows` is sorted by text."""

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
        device = self.policy.device.type
        self.row_columns = ROW_COLUMNS.get(device, ROW_COLUMNS_ELSEWHERE)
        self.wave_tokens = WAVE_TOKENS.get(device, WAVE_TOKENS_ELSEWHERE)
        self.drawn_together = DRAWN_TOGETHER.get(device, TEXTS_PER_CHUNK)
        self.words = Words(self.policy)

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
        written = Written.nothing(uniforms.shape)
        by_length = sorted(range(len(distinct)), key=lambda number: len(distinct[number]))
        for wave in _filled(by_length, [len(prompt) for prompt in distinct], self.wave_tokens):
            groups = self._begin(distinct, wave, prompt_of)
            while groups:
                groups = self._step(groups, sampling, uniforms, written, settled)
        return written.completions(distinct, prompt_of, self.words, self.version)

    def _begin(
        self, prompts: Sequence[Int[np.ndarray, " P"]], wave: Sequence[int], prompt_of: Int[np.ndarray, " N"]
    ) -> list[_Group]:
        """The prompts of a wave, packed into rows."""
        states = dict(zip(wave, self.memory.states([prompts[number] for number in wave]), strict=True))
        widths = {number: state.length - state.shared for number, state in states.items()}
        groups = []
        for numbers in _filled(wave, widths, self.row_columns - len(self.memory.reader.prefix_ids)):
            some = [states[number] for number in numbers]
            members = [np.flatnonzero(prompt_of == number) for number in numbers]
            groups.append(
                _Group(
                    texts=pack_prompts(self.memory.reader.prefix, some),
                    hidden=torch.stack([state.hidden for state in some]),
                    words=[()] * len(numbers),
                    rows=np.concatenate(members),
                    text_of=np.repeat(np.arange(len(numbers)), [len(rows) for rows in members]),
                )
            )
        return groups

    def _step(
        self,
        groups: Sequence[_Group],
        sampling: Sampling,
        uniforms: Float[np.ndarray, "N C"],
        written: Written,
        settled: Settled | None,
    ) -> list[_Group]:
        """One token more in every completion; the groups that go on, those that have become too wide cut in two.

        The groups take each step together, so that the weights are read once a step.
        """
        place = len(groups[0].words[0])
        draws = self._draw(groups, sampling, uniforms[:, place])
        following = [
            self._follow(group, place, *drawn, written, sampling, settled)
            for group, drawn in zip(groups, draws, strict=True)
        ]
        if place + 1 == uniforms.shape[1]:
            return []
        live = [(group, *found) for group, found in zip(groups, following, strict=True) if found is not None]
        if not live:
            return []
        hidden = extend(
            self.memory.reader,
            [group.texts for group, *_ in live],
            [parents for _, _, parents in live],
            [np.array([word[-1] for word in goes.words]) for _, goes, _ in live],
        )
        grown = []
        for (_, goes, parents), states in zip(live, hidden, strict=True):
            self.computed_tokens += len(parents)
            goes.hidden = states
            grown += self._cut(goes)
        return grown

    def _follow(
        self,
        group: _Group,
        place: int,
        drawn: Int[np.ndarray, " n"],
        logprobs: Float[np.ndarray, " n"],
        written: Written,
        sampling: Sampling,
        settled: Settled | None,
    ) -> tuple[_Group, Int[np.ndarray, " D"]] | None:
        """What goes on of a group after a draw, without its hidden states, and the text before each of its texts."""
        written.tokens[group.rows, place] = drawn
        written.logprobs[group.rows, place] = logprobs
        written.lengths[group.rows] = place + 1
        pairs, text_of = np.unique(np.stack([group.text_of, drawn], axis=1), axis=0, return_inverse=True)
        text_of = text_of.ravel()
        words = [(*group.words[parent], token) for parent, token in pairs.tolist()]
        over = np.array([self.words.is_over(word, sampling, settled) for word in words])
        written.stopped[group.rows] = over[text_of]
        if over.all():
            return None
        kept = np.flatnonzero(~over)
        number_of = np.cumsum(~over) - 1
        rows, text_of = group.rows[~over[text_of]], number_of[text_of[~over[text_of]]]
        by_text = np.argsort(text_of, kind="stable")
        goes = _Group(
            texts=group.texts,
            hidden=group.hidden,
            words=[words[number] for number in kept.tolist()],
            rows=rows[by_text],
            text_of=text_of[by_text],
        )
        return goes, pairs[kept, 0]

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
        self, groups: Sequence[_Group], sampling: Sampling, uniforms: Float[np.ndarray, " N"]
    ) -> list[tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
        """A token a completion and its log-probability, group by group; a bounded number of texts at a time."""
        hidden = torch.cat([group.hidden for group in groups])
        counts = [len(group.words) for group in groups]
        text_of = np.concatenate(
            [group.text_of + first for group, first in zip(groups, np.cumsum([0, *counts]), strict=False)]
        )
        uniform = uniforms[np.concatenate([group.rows for group in groups])]
        weight = self.policy.output_weight(None)
        parts = []
        for start in range(0, len(hidden), TEXTS_PER_CHUNK):
            logits = self.policy.project(hidden[start : start + TEXTS_PER_CHUNK], weight)
            for few in range(0, len(logits), self.drawn_together):
                logprobs = decoding_logprobs(logits[few : few + self.drawn_together], sampling)
                first, last = text_of.searchsorted((start + few, start + few + len(logprobs)))
                text = text_of[first:last] - start - few
                parts.append(draw_grouped(logprobs, text, uniform[first:last], sampling.greedy))
        ends = np.cumsum([len(group.rows) for group in groups])[:-1]
        tokens, logprobs_n = (np.split(np.concatenate(part), ends) for part in zip(*parts, strict=True))
        return list(zip(tokens, logprobs_n, strict=True))


def _filled(numbers: Sequence[int], sizes: Sequence[int] | Mapping[int, int], room: int) -> list[list[int]]:
    """Numbers in order, in parts whose sizes add up to `room` at most (or of one number)."""
    parts: list[list[int]] = []
    filled = 0
    for number in numbers:
        filled += sizes[number]
        if not parts or filled > room:
            parts.append([])
            filled = sizes[number]
        parts[-1].append(number)
    return parts
