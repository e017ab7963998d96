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

from msgrpo_lab.lap.blocks import Block, GrowingMemory
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.rollout.reading import KeysValues, PromptReader, PromptState, cache_of, cached, read_tokens


@dataclass(slots=True)
class PackedTexts:
    """Distinct texts in one row of keys and values; made by `pack_prompts`, continued by `extend`."""

    memory: GrowingMemory
    visible: Bool[np.ndarray, "D M"]
    """Which tokens of the row each text consists of."""
    lengths: Int[np.ndarray, " D"]
    """Tokens of each text."""

    @property
    def columns(self) -> int:
        """Tokens in the row."""
        return int(self.visible.shape[1])

    def part(self, texts: Int[np.ndarray, " D"]) -> PackedTexts:
        """These texts in a row of their own, without the tokens that none of them sees."""
        needed = np.flatnonzero(self.visible[texts].any(axis=0))
        store = self.memory.store
        index = torch.from_numpy(needed).to(store.device)
        return PackedTexts(
            memory=GrowingMemory(store.index_select(-2, index), len(needed)),
            visible=self.visible[np.ix_(texts, needed)],
            lengths=self.lengths[texts],
        )


@torch.no_grad()
def extend(
    reader: PromptReader,
    rows: Sequence[PackedTexts],
    parents: Sequence[Int[np.ndarray, " D"]],
    token_ids: Sequence[Int[np.ndarray, " D"]],
) -> list[Float[torch.Tensor, "D H"]]:
    """In each row, text d becomes text `parents[d]` with one more token; returns the hidden states after it.

    All rows in one call of a decoder that takes several blocks, one by one in any other. No value is read from the
    device here.
    """
    device = reader.policy.device
    positions = []
    for row, parent in zip(rows, parents, strict=True):
        row.visible = np.concatenate([row.visible[parent], np.eye(len(parent), dtype=bool)], axis=1)
        positions.append(torch.from_numpy(row.lengths[parent]).to(device)[None])
        row.lengths = row.lengths[parent] + 1
    tokens = [torch.from_numpy(some).to(device)[None] for some in token_ids]
    seen = [torch.from_numpy(row.visible).to(device)[None] for row in rows]
    if reader.decoder is None:
        steps = zip(rows, tokens, seen, positions, strict=True)
        return [_extend_one(reader.policy, row.memory, *step) for row, *step in steps]
    blocks = [
        Block(token_ids=some, positions=places, own_mask=mask, grows=row.memory)
        for row, some, places, mask in zip(rows, tokens, positions, seen, strict=True)
    ]
    hidden, _ = reader.decoder(blocks)
    return [states[0] for states in hidden]


def _extend_one(
    policy: LanguagePolicy,
    memory: GrowingMemory,
    tokens: Int[torch.Tensor, "1 D"],
    seen: Bool[torch.Tensor, "1 D M"],
    positions: Int[torch.Tensor, "1 D"],
) -> Float[torch.Tensor, "D H"]:
    """`extend` for one row, behind the model library's own cache."""
    count = tokens.shape[1]
    cache = cache_of(memory.store[:, :, None, :, : memory.length])
    hidden = read_tokens(policy, tokens, cache, seen[:, None], positions)
    memory.make_room(count)
    memory.store[:, :, :, memory.length : memory.length + count] = cached(cache, memory.length)[:, :, 0]
    memory.length += count
    return hidden[0]


def pack_prompts(prefix: KeysValues | None, states: Sequence[PromptState]) -> PackedTexts:
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
        memory=GrowingMemory(torch.cat(parts, dim=-2), int(ends[-1])),
        visible=visible,
        lengths=np.array([state.length for state in states], dtype=np.int64),
    )
