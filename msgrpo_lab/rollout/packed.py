"""Many texts continued in one row: a tree of tokens whose attention mask lets each see its own ancestors only.

The shared prefix, what follows it in each prompt, and every token written since stand side by side in one row of the
key-value cache, each once, however many texts go through it. A step appends one token a distinct text; nothing is
copied when texts part, and a step's cost is its distinct new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from transformers import DynamicCache

from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.rollout.reading import KeysValues, PromptState, cache_of, cached, read_tokens


@dataclass(slots=True)
class PackedTexts:
    """Distinct texts in one row of the key-value cache; made by `pack_prompts`."""

    policy: LanguagePolicy
    """Must not change while this object lives."""
    cache: DynamicCache
    visible: Bool[np.ndarray, "D M"]
    """Which tokens of the row each text consists of."""
    lengths: Int[np.ndarray, " D"]
    """Tokens of each text."""

    @property
    def columns(self) -> int:
        """Tokens in the row."""
        return int(self.visible.shape[1])

    @torch.no_grad()
    def extend(self, parents: Int[np.ndarray, " D"], token_ids: Int[np.ndarray, " D"]) -> Float[torch.Tensor, "D H"]:
        """Text d becomes text `parents[d]` with one more token; returns the hidden states after it.

        No value is read from the device here.
        """
        self.visible = np.concatenate([self.visible[parents], np.eye(len(parents), dtype=bool)], axis=1)
        positions = self.lengths[parents]
        self.lengths = positions + 1
        device = self.policy.device
        hidden = read_tokens(
            self.policy,
            torch.from_numpy(token_ids).to(device)[None],
            self.cache,
            torch.from_numpy(self.visible).to(device)[None, None],
            torch.from_numpy(positions).to(device)[None],
        )
        return hidden[0]

    def part(self, texts: Int[np.ndarray, " D"]) -> PackedTexts:
        """These texts in a row of their own, without the tokens that none of them sees."""
        needed = np.flatnonzero(self.visible[texts].any(axis=0))
        index = torch.from_numpy(needed).to(self.policy.device)
        return PackedTexts(
            policy=self.policy,
            cache=cache_of(cached(self.cache, 0).index_select(-2, index)),
            visible=self.visible[np.ix_(texts, needed)],
            lengths=self.lengths[texts],
        )


def pack_prompts(policy: LanguagePolicy, prefix: KeysValues | None, states: Sequence[PromptState]) -> PackedTexts:
    """Prompts, with their keys and values, as the first texts of a row; `prefix` is what they share, if anything."""
    start = 0 if prefix is None else prefix.shape[-2]
    ends = start + np.cumsum([state.length - state.shared for state in states])
    visible = np.zeros((len(states), int(ends[-1])), dtype=bool)
    parts = [] if prefix is None else [prefix]
    for seen, state, end in zip(visible, states, ends.tolist(), strict=True):
        if state.keys_values is None:
            raise ValueError("prompts to be continued must be read with keep=True")
        seen[: state.shared] = True
        seen[end - (state.length - state.shared) : end] = True
        parts.append(state.keys_values)
    return PackedTexts(
        policy=policy,
        cache=cache_of(torch.cat(parts, dim=-2)[:, :, None]),
        visible=visible,
        lengths=np.array([state.length for state in states], dtype=np.int64),
    )
