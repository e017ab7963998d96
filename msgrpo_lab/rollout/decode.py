"""Free decoding, token by token, with every distinct text continued once.

Completions of equal prompts share one row of the key-value cache until they draw different tokens; then the row is
split. A finished completion leaves the batch. So the cost of a step is the number of *distinct unfinished* texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from msgrpo_lab.lap.decoding import decoding_logprobs, draw
from msgrpo_lab.lap.policy import MIN_SHARED_PREFIX, LanguagePolicy
from msgrpo_lab.lap.rows import pad_rows
from msgrpo_lab.types import Completion, FinishReason, Sampling


class FreeDecoder:
    """Samples completions over the whole vocabulary under one policy version.

    Args:
        policy: the policy; it must not change while this object lives.
        version: its version.
        token_budget: padded prompt tokens of one prefill at most (at least one prompt).
    """

    def __init__(self, policy: LanguagePolicy, version: int, token_budget: int) -> None:
        self.policy = policy
        self.version = version
        self.token_budget = token_budget
        self.computed_tokens = 0

    def generate(
        self, prompts: Sequence[Int[np.ndarray, " P"]], sampling: Sampling, uniforms: Float[np.ndarray, "N C"]
    ) -> list[Completion]:
        """One completion a prompt. `uniforms` in [0, 1) decide: row n, column c draws token c of completion n."""
        members: dict[bytes, list[int]] = {}
        for index, prompt in enumerate(prompts):
            members.setdefault(prompt.tobytes(), []).append(index)
        distinct = sorted(members.values(), key=lambda indices: len(prompts[indices[0]]))
        completions: dict[int, Completion] = {}
        while distinct:
            # Sorted by length, so the last prompt of a chunk is its longest.
            count = 1
            while count < len(distinct) and (count + 1) * len(prompts[distinct[count][0]]) <= self.token_budget:
                count += 1
            chunk, distinct = distinct[:count], distinct[count:]
            completions |= self._decode_chunk([prompts[indices[0]] for indices in chunk], chunk, sampling, uniforms)
        return [completions[index] for index in range(len(prompts))]

    @torch.no_grad()
    def _decode_chunk(
        self,
        prompts: Sequence[Int[np.ndarray, " P"]],
        members: Sequence[Sequence[int]],
        sampling: Sampling,
        uniforms: Float[np.ndarray, "N C"],
    ) -> dict[int, Completion]:
        """Completes distinct prompts; `members[d]` are the completions that prompt d is asked for."""
        decoder = _CachedDecoder(self.policy, prompts)
        self.computed_tokens += sum(map(len, prompts))
        rows = np.array([index for indices in members for index in indices])
        text_of = np.array([number for number, indices in enumerate(members) for _ in indices])
        prompt_of = dict(zip(rows.tolist(), text_of.tolist(), strict=True))
        tokens: dict[int, list[int]] = {index: [] for index in rows.tolist()}
        logprobs: dict[int, list[float]] = {index: [] for index in rows.tolist()}
        finish: dict[int, FinishReason] = dict.fromkeys(rows.tolist(), "length")
        ends = self.policy.end_token_ids
        for place in range(sampling.max_new_tokens):
            distribution = decoding_logprobs(decoder.logits, sampling).cpu().numpy()
            drawn = np.empty(len(rows), dtype=np.int64)
            for start in range(0, len(rows), 256):  # bounds the [rows, vocabulary] array of cumulative sums
                part = slice(start, start + 256)
                drawn[part] = draw(distribution[text_of[part]], uniforms[rows[part], place], sampling.greedy)
            unfinished = np.zeros(len(rows), dtype=bool)
            for position, (index, token) in enumerate(zip(rows.tolist(), drawn.tolist(), strict=True)):
                tokens[index].append(token)
                logprobs[index].append(float(distribution[text_of[position], token]))
                if token in ends or (sampling.stop and any(s in self._text(tokens[index]) for s in sampling.stop)):
                    finish[index] = "stop"
                else:
                    unfinished[position] = True
            rows = rows[unfinished]
            if not rows.size or place + 1 == sampling.max_new_tokens:
                break
            pairs = np.stack([text_of[unfinished], drawn[unfinished]], axis=1)
            continued, text_of = np.unique(pairs, axis=0, return_inverse=True)
            decoder.extend(parents=continued[:, 0], token_ids=continued[:, 1])
            self.computed_tokens += len(continued)
        return {
            index: Completion(
                prompt_ids=prompts[prompt_of[index]],
                token_ids=np.array(tokens[index], dtype=np.int64),
                logprobs=np.array(logprobs[index], dtype=np.float32),
                text=self._text(tokens[index]),
                finish_reason=finish[index],
                policy_version=self.version,
            )
            for index in tokens
        }

    def _text(self, token_ids: Sequence[int]) -> str:
        text: str = self.policy.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


class _CachedDecoder:
    """Logits of the next token after each distinct text, grown a token at a time on a key-value cache."""

    def __init__(self, policy: LanguagePolicy, prompts: Sequence[Int[np.ndarray, " P"]]) -> None:
        self.policy = policy
        rows = pad_rows(prompts)
        shared = rows.shared_prefix() if len(prompts) > 1 else 0
        shared = shared if shared >= MIN_SHARED_PREFIX else 0
        device = policy.device
        ids = torch.from_numpy(rows.input_ids).to(device)
        self.position = torch.from_numpy(rows.lengths).to(device)
        columns = torch.arange(ids.shape[1], device=device)
        self.mask = columns[None] < self.position[:, None]
        self.cache = policy.prefix_cache(ids[0, :shared]) if shared else policy.empty_cache()
        if shared:
            self.cache.batch_repeat_interleave(len(prompts))
        hidden = policy.decode_step(ids[:, shared:], self.cache, self.mask, columns[None, shared:].expand(len(ids), -1))
        last = self.position - 1 - shared
        self.logits = policy.project(hidden[torch.arange(len(ids), device=device), last], policy.output_weight(None))

    def extend(self, parents: Int[np.ndarray, " D"], token_ids: Int[np.ndarray, " D"]) -> None:
        """The new texts: text d is text `parents[d]` with one more token."""
        parent = torch.from_numpy(parents).to(self.mask.device)
        self.cache.batch_select_indices(parent)
        self.position = self.position[parent]
        self.mask = torch.cat([self.mask[parent], self.mask.new_ones(len(parent), 1)], dim=1)
        tokens = torch.from_numpy(token_ids).to(self.mask.device)[:, None]
        hidden = self.policy.decode_step(tokens, self.cache, self.mask, self.position[:, None])
        self.position = self.position + 1
        self.logits = self.policy.project(hidden[:, -1], self.policy.output_weight(None))
