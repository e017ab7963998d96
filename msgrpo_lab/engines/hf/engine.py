"""The in-process engine: the policy being trained completes the prompts itself, on its own device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from msgrpo_lab.engines.base import Settled, check_lengths, draw_uniforms
from msgrpo_lab.engines.hf.constrained import ChoiceDecoder
from msgrpo_lab.engines.hf.free import FreeDecoder
from msgrpo_lab.engines.hf.prompts import PromptReader
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Completion, Sampling


class _Synced(NamedTuple):
    """What stands on one policy version."""

    reader: PromptReader
    choice: ChoiceDecoder
    free: FreeDecoder


class HFEngine:
    """Completes prompts with the Hugging Face model that is being trained.

    Between two calls of `sync` the prefix that prompts share is computed once. So are each distinct prompt and, with
    free decoding, each distinct beginning of an answer to it, in whatever turn and episode it is met: until a call
    leaves more than `memory_tokens` tokens, when all are forgotten.

    Args:
        token_budget: padded prompt tokens of one forward pass at most.
        memory_tokens: tokens of prompts and completions whose keys and values are kept from one turn to the next at
            most, besides the shared prefix (free decoding).
    """

    samples_policy = True

    def __init__(self, *, token_budget: int = 8192, memory_tokens: int = 65536) -> None:
        if token_budget < 1:
            raise ValueError(f"engine.token_budget={token_budget}: must be at least 1")
        if memory_tokens < 0:
            raise ValueError(f"engine.memory_tokens={memory_tokens}: must be at least 0; 0 remembers nothing")
        self.token_budget = token_budget
        self.memory_tokens = memory_tokens
        self._synced: _Synced | None = None

    def sync(self, policy: LanguagePolicy, version: int) -> None:
        """See `RolloutEngine.sync`. All that is remembered is dropped, even of the same policy and version.

        Which prompts a forward pass holds moves the last bits of its logits. So that a rollout is the same to the bit
        whether or not an evaluation (or a restart) came before it, it never goes on from what another one computed.
        """
        reader = PromptReader(policy, self.token_budget)
        free = FreeDecoder(reader, version, self.memory_tokens)
        self._synced = _Synced(reader, ChoiceDecoder(reader, version), free)

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
        if self._synced is None:
            raise RuntimeError("engine: call sync() before generate()")
        check_lengths(prompts, rngs)
        if not prompts:
            return []
        if sampling.choices is None:
            uniforms = draw_uniforms(rngs, sampling.max_new_tokens, sampling)
            return self._synced.free.generate(prompts, sampling, uniforms, settled)
        uniforms = draw_uniforms(rngs, max(map(len, sampling.choices)), sampling)
        return self._synced.choice.generate(prompts, sampling, uniforms)

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the model since the last `sync`."""
        if self._synced is None:
            return 0
        reader, choice, free = self._synced
        return reader.computed_tokens + choice.computed_tokens + free.computed_tokens

    def metrics(self) -> Mapping[str, float]:
        """See `RolloutEngine.metrics`.

        `rollout_computed_tokens` is what went through the model; `cache_tokens` the tokens of prompts and completions
        whose keys and values are held, the shared prefix included; `cache_hits` the distinct prompts of a turn that an
        earlier turn had read; `cache_evictions` the prompts forgotten because the cache was full.
        """
        if self._synced is None:
            return {}
        reader, choice, free = self._synced
        return {
            "rollout_computed_tokens": float(self.computed_tokens),
            "cache_tokens": float(free.pool.tokens + len(reader.prefix_ids)),
            "cache_hits": float(free.hits + choice.hits),
            "cache_evictions": float(free.evictions),
        }

    def close(self) -> None:
        """Drops the policy and all that is remembered of it."""
        self._synced = None
