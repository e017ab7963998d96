"""Constrained decoding: the distribution over the legal words, computed once for each distinct prompt.

With a handful of legal words the whole tree of answers is small, so one forward pass gives the exact distribution of a
prompt, and every episode that reads the prompt under the same policy draws from it without touching the model again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int

from msgrpo_lab.lap.decoding import ChoiceTrie, decoding_logprobs, draw
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.rows import pad_rows
from msgrpo_lab.types import Completion, Sampling


@lru_cache(maxsize=64)
def choice_trie(choices: tuple[tuple[int, ...], ...]) -> ChoiceTrie:
    """The tree of a set of legal answers."""
    return ChoiceTrie(choices)


class ChoiceDecoder:
    """Draws legal words under one policy version, remembering the logits of every prompt it has met.

    Args:
        policy: the policy; it must not change while this object lives.
        version: its version.
        token_budget: padded tokens of one forward pass at most (at least one prompt).
    """

    def __init__(self, policy: LanguagePolicy, version: int, token_budget: int) -> None:
        self.policy = policy
        self.version = version
        self.token_budget = token_budget
        self.computed_tokens = 0
        self._logits: dict[tuple[tuple[int, ...], ...], dict[bytes, Float[torch.Tensor, "Q A"]]] = {}
        self._completions: dict[Sampling, dict[tuple[bytes, tuple[int, ...]], Completion]] = {}

    def logits(
        self, prompts: Sequence[Int[np.ndarray, " P"]], choices: tuple[tuple[int, ...], ...]
    ) -> list[Float[torch.Tensor, "Q A"]]:
        """Logits of the tree's tokens in each of its states, for every prompt; each distinct one computed once."""
        trie = choice_trie(choices)
        known = self._logits.setdefault(choices, {})
        keys = [prompt.tobytes() for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
        ordered = sorted(missing.items(), key=lambda item: len(item[1]))
        longest_prefix = max(map(len, trie.prefixes))
        while ordered:
            count = 1
            while (
                count < len(ordered)
                and (count + 1) * len(trie.prefixes) * (len(ordered[count][1]) + longest_prefix) <= self.token_budget
            ):
                count += 1
            chunk, ordered = ordered[:count], ordered[count:]
            known |= self._compute(chunk, trie)
        return [known[key] for key in keys]

    @torch.no_grad()
    def _compute(
        self, chunk: Sequence[tuple[bytes, Int[np.ndarray, " P"]]], trie: ChoiceTrie
    ) -> dict[bytes, Float[torch.Tensor, "Q A"]]:
        suffixes = [np.array(prefix, dtype=np.int64) for prefix in trie.prefixes]
        rows = pad_rows([np.concatenate([prompt, suffix]) for _, prompt in chunk for suffix in suffixes])
        self.computed_tokens += rows.num_tokens
        hidden = self.policy.node_hidden(rows, np.arange(len(rows.lengths)), rows.lengths - 1)
        columns = torch.from_numpy(trie.columns).to(hidden.device)
        logits = self.policy.project(hidden, self.policy.output_weight(columns)).cpu()
        return {
            key: prompt_logits
            for (key, _), prompt_logits in zip(chunk, torch.split(logits, len(suffixes)), strict=True)
        }

    def generate(
        self, prompts: Sequence[Int[np.ndarray, " P"]], sampling: Sampling, uniforms: Float[np.ndarray, "N C"]
    ) -> list[Completion]:
        """One legal word a prompt. `uniforms` in [0, 1) decide: one column a token."""
        assert sampling.choices is not None
        trie = choice_trie(sampling.choices)
        logits_NQA = torch.stack(self.logits(prompts, sampling.choices))
        shape = logits_NQA.shape
        allowed = torch.from_numpy(trie.allowed).expand(shape).reshape(-1, shape[-1])
        logprobs_NQA = decoding_logprobs(logits_NQA.reshape(-1, shape[-1]), sampling, allowed).reshape(shape).numpy()
        rows = np.arange(len(prompts))
        state = np.zeros(len(prompts), dtype=np.int64)
        drawn = np.full((len(prompts), uniforms.shape[1]), -1, dtype=np.int64)
        logprob = np.zeros((len(prompts), uniforms.shape[1]), dtype=np.float32)
        live = rows
        for place in range(uniforms.shape[1]):
            column = draw(logprobs_NQA[live, state[live]], uniforms[live, place], sampling.greedy)
            logprob[live, place] = logprobs_NQA[live, state[live], column]
            drawn[live, place] = trie.columns[column]
            state[live] = trie.next_state[state[live], column]
            live = live[state[live] != ChoiceTrie.END]
            if not live.size:
                break
        known = self._completions.setdefault(sampling, {})
        completions = []
        for prompt, tokens, values in zip(prompts, drawn, logprob, strict=True):
            count = int((tokens >= 0).sum())
            word = tuple(tokens[:count].tolist())
            key = (prompt.tobytes(), word)
            if key not in known:
                known[key] = Completion(
                    prompt_ids=prompt,
                    token_ids=tokens[:count].copy(),
                    logprobs=values[:count].copy(),
                    text=_decode(self.policy.tokenizer, word),
                    finish_reason="stop",
                    policy_version=self.version,
                )
            completions.append(known[key])
        return completions


@lru_cache(maxsize=4096)
def _decode(tokenizer: object, token_ids: tuple[int, ...]) -> str:
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)  # type: ignore[attr-defined]
    return text
