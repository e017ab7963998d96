"""The reference engine: every episode is a row of its own, and every turn reads every prompt from its beginning.

This is what a competent loop over a Hugging Face model does: prompts padded on the left, a key-value cache within the
turn, logits of the whole vocabulary. Nothing is shared between rows and nothing outlives the call. It draws from the
same generators in the same order as `engine=hf`, so both write the same tokens wherever rounding allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int

from msgrpo_lab.decoder.decoding import ChoiceTrie, decoding_logprobs, draw
from msgrpo_lab.engines.base import Settled, check_lengths, draw_uniforms
from msgrpo_lab.engines.hf.constrained import choice_trie
from msgrpo_lab.engines.hf.prompts import read_tokens
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Completion, Sampling


class NaiveEngine:
    """Completes prompts with the model that is being trained, without any shortcut.

    Args:
        token_budget: padded prompt tokens of one batch at most (at least one prompt).
    """

    samples_policy = True

    def __init__(self, *, token_budget: int = 16384) -> None:
        if token_budget < 1:
            raise ValueError(f"engine.token_budget={token_budget}: must be at least 1")
        self.token_budget = token_budget
        self.computed_tokens = 0
        self._policy: LanguagePolicy | None = None
        self._version = 0

    def sync(self, policy: LanguagePolicy, version: int) -> None:
        """See `RolloutEngine.sync`."""
        self._policy, self._version, self.computed_tokens = policy, version, 0

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
        if not prompts:
            return []
        tokens = sampling.max_new_tokens if sampling.choices is None else max(map(len, sampling.choices))
        uniforms = draw_uniforms(rngs, tokens, sampling)
        size = max(1, self.token_budget // max(map(len, prompts)))
        completions: list[Completion] = []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            completions += self._generate(self._policy, prompts[part], sampling, uniforms[part], settled)
        return completions

    @torch.no_grad()
    def _generate(
        self,
        policy: LanguagePolicy,
        prompts: Sequence[Int[np.ndarray, " P"]],
        sampling: Sampling,
        uniforms: Float[np.ndarray, "N C"],
        settled: Settled | None,
    ) -> list[Completion]:
        """One batch; rows that have ended go on being computed until the last one has."""
        device = policy.device
        trie = None if sampling.choices is None else choice_trie(sampling.choices)
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.copy())
            mask[row, width - len(prompt) :] = True
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0).to(device)
        ids, mask = ids.to(device), mask.to(device)
        cache = policy.empty_cache()
        hidden = read_tokens(policy, ids, cache, mask, positions, use_library=True)[:, -1]
        self.computed_tokens += sum(map(len, prompts))
        answers = [_Answer() for _ in prompts]
        states = np.zeros(len(prompts), dtype=np.int64)
        for place in range(uniforms.shape[1]):
            logits = policy.project(hidden, policy.output_weight(None)).cpu()
            drawn, logprobs = _draw(logits, sampling, trie, states, uniforms[:, place])
            for row, answer in enumerate(answers):
                if answer.live:
                    answer.tokens.append(int(drawn[row]))
                    answer.logprobs.append(float(logprobs[row]))
                    if trie is not None:
                        states[row] = trie.next_state[states[row], trie.column(int(drawn[row]))]
                        answer.live = bool(states[row] != ChoiceTrie.END)
                    else:
                        answer.live = not _is_over(policy, answer.tokens, sampling, settled)
            if place + 1 == uniforms.shape[1] or not any(answer.live for answer in answers):
                break
            self.computed_tokens += sum(answer.live for answer in answers)
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            positions = (mask.sum(dim=1) - 1)[:, None]
            token = torch.from_numpy(drawn).to(device)[:, None]
            hidden = read_tokens(policy, token, cache, mask, positions, use_library=True)[:, -1]
        return [
            Completion(
                prompt_ids=prompt,
                token_ids=np.array(answer.tokens, dtype=np.int64),
                logprobs=np.array(answer.logprobs, dtype=np.float32),
                text=_text(policy, answer.tokens),
                finish_reason="length" if answer.live else "stop",
                policy_version=self._version,
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def metrics(self) -> Mapping[str, float]:
        """See `RolloutEngine.metrics`."""
        return {"rollout_computed_tokens": float(self.computed_tokens)}

    def close(self) -> None:
        """Drops the policy."""
        self._policy = None


@dataclass(slots=True)
class _Answer:
    """What one row has written so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    live: bool = True


def _draw(
    logits: Float[torch.Tensor, "N V"],
    sampling: Sampling,
    trie: ChoiceTrie | None,
    states: Int[np.ndarray, " N"],
    uniforms: Float[np.ndarray, " N"],
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """A token a row and its log-probability (nats), under the decoding rule."""
    if trie is None:
        logprobs = decoding_logprobs(logits, sampling).numpy()
        tokens = columns = draw(logprobs, uniforms, sampling.greedy)
    else:
        allowed = torch.from_numpy(trie.allowed[states])
        logprobs = decoding_logprobs(logits[:, torch.from_numpy(trie.columns)], sampling, allowed).numpy()
        columns = draw(logprobs, uniforms, sampling.greedy)
        tokens = trie.columns[columns]
    return tokens, logprobs[np.arange(len(logprobs)), columns]


def _is_over(policy: LanguagePolicy, tokens: list[int], sampling: Sampling, settled: Settled | None) -> bool:
    if tokens[-1] in policy.end_token_ids:
        return True
    text = _text(policy, tokens)
    return any(stop in text for stop in sampling.stop) or (settled is not None and settled(text))


def _text(policy: LanguagePolicy, tokens: list[int]) -> str:
    text: str = policy.tokenizer.decode(tokens, skip_special_tokens=True)
    return text
