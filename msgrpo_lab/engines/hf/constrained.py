"""Constrained decoding: the distribution over the legal words, computed once for each distinct prompt.

With a handful of legal words the whole tree of answers is small: a prompt is read once, the tree's inner tokens behind
it, and every episode that reads the prompt under the same policy draws from it without touching the model again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int

from msgrpo_lab.decoder.decoding import ChoiceTrie, decoding_logprobs, draw
from msgrpo_lab.engines.hf.prompts import PromptReader, Text, TextPool
from msgrpo_lab.types import Completion, Sampling


@lru_cache(maxsize=64)
def choice_trie(choices: tuple[tuple[int, ...], ...]) -> ChoiceTrie:
    """The tree of a set of legal answers."""
    return ChoiceTrie(choices)


class ChoiceDecoder:
    """Draws legal words under one policy version, remembering the logits of every prompt it has met.

    What is remembered is a few numbers a prompt, less than the prompt itself takes in the episodes that read it.

    Args:
        reader: reads prompts under that policy version.
        version: the version.
    """

    def __init__(self, reader: PromptReader, version: int) -> None:
        self.reader = reader
        self.policy = reader.policy
        self.version = version
        self.computed_tokens = 0
        """Tokens computed behind the prompts, which the reader counts."""
        self.hits = 0
        """Distinct prompts of a call that an earlier call had met."""
        self._logits: dict[tuple[tuple[int, ...], ...], dict[bytes, Float[torch.Tensor, "Q A"]]] = {}
        self._completions: dict[Sampling, dict[tuple[bytes, tuple[int, ...]], Completion]] = {}

    def logits(
        self, prompts: Sequence[Int[np.ndarray, " P"]], choices: tuple[tuple[int, ...], ...]
    ) -> Float[torch.Tensor, "U Q A"]:
        """Logits of the tree's tokens in each of its states, for distinct prompts; each computed once."""
        trie = choice_trie(choices)
        known = self._logits.setdefault(choices, {})
        keys = [prompt.tobytes() for prompt in prompts]
        missing = [index for index, key in enumerate(keys) if key not in known]
        self.hits += len(keys) - len(missing)
        width = max(1, self.reader.token_budget // max(map(len, prompts)))
        for start in range(0, len(missing), width):
            part = missing[start : start + width]
            found = self._compute([prompts[index] for index in part], trie)
            known.update(zip((keys[index] for index in part), found, strict=True))
        return torch.stack([known[key] for key in keys])

    @torch.no_grad()
    def _compute(self, prompts: Sequence[Int[np.ndarray, " P"]], trie: ChoiceTrie) -> list[Float[torch.Tensor, "Q A"]]:
        """Each prompt is read once; behind it, each state of the tree is one token more than the state before it."""
        deep = len(trie.prefixes) > 1
        states, count = self.reader.read(prompts, keep=deep), len(prompts)
        hidden_of: dict[int, Float[torch.Tensor, "U width"]] = {0: torch.stack([state.hidden for state in states])}
        if deep:
            pool = TextPool(self.reader)
            texts: dict[tuple[int, ...], list[Text]] = {(): pool.add(states)}
            for depth in range(1, max(map(len, trie.prefixes)) + 1):
                level = [state for state, prefix in enumerate(trie.prefixes) if len(prefix) == depth]
                shorter = [texts[trie.prefixes[state][:-1]][number] for number in range(count) for state in level]
                last = np.tile([trie.prefixes[state][-1] for state in level], count)
                longer, hidden = pool.extend(shorter, last)
                for place, state in enumerate(level):
                    texts[trie.prefixes[state]] = longer[place :: len(level)]
                    hidden_of[state] = hidden[place :: len(level)]
                self.computed_tokens += len(last)
        hidden_UQH = torch.stack([hidden_of[state] for state in range(len(trie.prefixes))], dim=1)
        columns = torch.from_numpy(trie.columns).to(self.policy.device)
        logits = self.policy.project(hidden_UQH.flatten(0, 1), self.policy.output_weight(columns)).cpu()
        return list(logits.view(count, len(trie.prefixes), -1))

    def generate(
        self, prompts: Sequence[Int[np.ndarray, " P"]], sampling: Sampling, uniforms: Float[np.ndarray, "N C"]
    ) -> list[Completion]:
        """One legal word a prompt. `uniforms` in [0, 1) decide: one column a token."""
        assert sampling.choices is not None
        trie = choice_trie(sampling.choices)
        distinct, prompt_of = distinct_prompts(prompts)
        logits_UQA = self.logits(distinct, sampling.choices)
        shape = logits_UQA.shape
        allowed = torch.from_numpy(trie.allowed).expand(shape).reshape(-1, shape[-1])
        logprobs_UQA = decoding_logprobs(logits_UQA.reshape(-1, shape[-1]), sampling, allowed).reshape(shape).numpy()
        state = np.zeros(len(prompts), dtype=np.int64)
        drawn = np.full(uniforms.shape, -1, dtype=np.int64)
        logprob = np.zeros(uniforms.shape, dtype=np.float32)
        live = np.arange(len(prompts))
        for place in range(uniforms.shape[1]):
            distribution = logprobs_UQA[prompt_of[live], state[live]]
            column = draw(distribution, uniforms[live, place], sampling.greedy)
            logprob[live, place] = distribution[np.arange(len(live)), column]
            drawn[live, place] = trie.columns[column]
            state[live] = trie.next_state[state[live], column]
            live = live[state[live] != ChoiceTrie.END]
            if not live.size:
                break
        known = self._completions.setdefault(sampling, {})
        answers, first, answer_of = np.unique(
            np.concatenate([prompt_of[:, None], drawn], axis=1), axis=0, return_index=True, return_inverse=True
        )
        made = []
        for (prompt, *tokens), row in zip(answers.tolist(), first.tolist(), strict=True):
            word = tuple(token for token in tokens if token >= 0)
            key = (distinct[prompt].tobytes(), word)
            if key not in known:
                known[key] = Completion(
                    prompt_ids=distinct[prompt],
                    token_ids=np.array(word, dtype=np.int64),
                    logprobs=logprob[row, : len(word)].copy(),
                    text=_decode(self.policy.tokenizer, word),
                    finish_reason="stop",
                    policy_version=self.version,
                )
            made.append(known[key])
        return [made[answer] for answer in answer_of.ravel().tolist()]


def distinct_prompts(
    prompts: Sequence[Int[np.ndarray, " P"]],
) -> tuple[list[Int[np.ndarray, " P"]], Int[np.ndarray, " N"]]:
    """The distinct prompts in the order they first appear, and which of them each prompt is."""
    number_of: dict[bytes, int] = {}
    by_identity: dict[int, int] = {}
    distinct: list[Int[np.ndarray, " P"]] = []
    prompt_of = np.empty(len(prompts), dtype=np.int64)
    for index, prompt in enumerate(prompts):
        number = by_identity.get(id(prompt))
        if number is None:
            number = number_of.setdefault(prompt.tobytes(), len(distinct))
            if number == len(distinct):
                distinct.append(prompt)
            by_identity[id(prompt)] = number
        prompt_of[index] = number
    return distinct, prompt_of


@lru_cache(maxsize=4096)
def _decode(tokenizer: object, token_ids: tuple[int, ...]) -> str:
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)  # type: ignore[attr-defined]
    return text
