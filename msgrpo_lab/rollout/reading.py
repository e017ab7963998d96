"""Reading prompts under one policy version: the rules they share once, and then what is left of each.

The first call keeps the keys and values of the longest prefix that its prompts have in common. Later prompts start from
as much of it as they open with, which may be less than all or nothing: causal attention makes any part of it exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from transformers import DynamicCache

from msgrpo_lab.decoder.block_decoder import Block, BlockDecoder, Memory, Read
from msgrpo_lab.decoder.plan import pad_rows
from msgrpo_lab.decoder.tree import cut_tree, group_by_length, pad_branches, row_width
from msgrpo_lab.lap.policy import LanguagePolicy

MIN_SHARED_PREFIX = 8
"""Shorter common prefixes are not worth a call of their own."""

KeysValues = Float[torch.Tensor, "J 2 H N D"]
"""Keys and values of N consecutive tokens in the J layers of one row: H heads of width D."""


class PromptState(NamedTuple):
    """What the policy holds after reading a prompt."""

    shared: int
    """Leading tokens whose keys and values are those of the shared prefix."""
    length: int
    hidden: Float[torch.Tensor, " width"]
    """Last hidden state, from which the next token is predicted."""
    keys_values: KeysValues | None
    """Of the tokens after the shared ones; None if they were not asked for."""


def read_tokens(
    policy: LanguagePolicy,
    token_ids: Int[torch.Tensor, "B N"],
    cache: DynamicCache,
    mask: Bool[torch.Tensor, "B M"] | Bool[torch.Tensor, "B 1 N M"],
    positions: Int[torch.Tensor, "B N"],
    plain: bool = False,
) -> Float[torch.Tensor, "B N width"]:
    """Last hidden states of N further tokens a row; `cache` grows by them.

    `mask` marks the real ones among the M tokens so far (causal attention), or says for each of the N tokens which it
    may look at. Padding is on the right, unless it is read `plain`, by the model library's own modules.
    """
    return policy.decoder(plain).extend(token_ids, cache, mask, positions)


def cache_of(keys_values: Float[torch.Tensor, "J 2 B H N D"] | None) -> DynamicCache:
    """A key-value cache that holds these; an empty one for None."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(() if keys_values is None else keys_values):
        cache.update(keys, values, layer)
    return cache


def cached(cache: DynamicCache, start: int) -> Float[torch.Tensor, "J 2 B H N D"]:
    """What a cache holds from token `start` on."""
    layers: list[Any] = cache.layers
    return torch.stack([torch.stack((layer.keys[:, :, start:], layer.values[:, :, start:])) for layer in layers])


def check_full_attention(policy: LanguagePolicy) -> None:
    """Raises `ValueError` for a model whose layers do not all look at the whole text before a token."""
    config: Any = policy.model.config  # PEFT's wrapper hands its base model's on
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "use_sliding_window", None) or getattr(config, "attention_chunk_size", None):
        raise ValueError(
            f"engine=hf: {config.model_type} has layers of {', '.join(sorted(kinds)) or 'sliding attention'}, which "
            "share no prefix here; use engine=naive"
        )


class PromptReader:
    """Reads distinct prompts in batches of like length.

    Args:
        policy: the policy; it must not change while this object lives.
        token_budget: padded tokens of one forward pass at most (at least one prompt).
    """

    def __init__(self, policy: LanguagePolicy, token_budget: int) -> None:
        check_full_attention(policy)
        self.policy = policy
        self.decoder: BlockDecoder | None = None if policy.blocks is None else policy.blocks.frozen()
        """Runs the policy as it is now, if the block decoder knows its model."""
        self.token_budget = token_budget
        self.computed_tokens = 0
        self.prefix: KeysValues | None = None
        self.prefix_ids: Int[np.ndarray, " F"] = np.zeros(0, dtype=np.int64)

    @torch.no_grad()
    def read(self, prompts: Sequence[Int[np.ndarray, " P"]], keep: bool) -> list[PromptState]:
        """The state after each of these distinct prompts; with keys and values if `keep`."""
        if self.prefix is None and prompts:
            self._keep_prefix(prompts)
        shared = [self._shared(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: (shared[i] > 0, len(prompts[i]) - shared[i]))
        states: dict[int, PromptState] = {}
        while order:
            count, start, longest = 0, shared[order[0]], 0
            for index in order:
                earlier, longer = min(start, shared[index]), max(longest, len(prompts[index]))
                mixed = (shared[index] > 0) != (start > 0)
                if count and (mixed or (count + 1) * (longer - earlier) > self.token_budget):
                    break
                count, start, longest = count + 1, earlier, longer
            chunk, order = order[:count], order[count:]
            some = [prompts[index] for index in chunk]
            if self.decoder is None:
                found = self._read_rows(some, start, keep)
            else:
                found = self._read_trees(self.decoder, some, start, keep)
            states.update(zip(chunk, found, strict=True))
        return [states[index] for index in range(len(prompts))]

    def _keep_prefix(self, prompts: Sequence[Int[np.ndarray, " P"]]) -> None:
        rows = pad_rows(prompts)
        length = rows.shared_prefix()
        if length < MIN_SHARED_PREFIX:
            return
        self.prefix_ids = rows.input_ids[0, :length].copy()
        cache = DynamicCache()
        ids = torch.from_numpy(self.prefix_ids).to(self.policy.device)[None]
        positions = torch.arange(length, device=ids.device)[None]
        read_tokens(self.policy, ids, cache, torch.ones_like(ids, dtype=torch.bool), positions)
        self.prefix = cached(cache, 0)[:, :, 0]
        self.computed_tokens += length

    def _shared(self, prompt: Int[np.ndarray, " P"]) -> int:
        """Leading tokens of a prompt, short of its last, that the kept prefix holds; 0 if hardly any."""
        limit = min(len(prompt) - 1, len(self.prefix_ids))
        same = prompt[:limit] == self.prefix_ids[:limit]
        length = limit if same.all() else int(same.argmin())
        return length if length >= MIN_SHARED_PREFIX else 0

    def _read_rows(self, prompts: Sequence[Int[np.ndarray, " P"]], start: int, keep: bool) -> list[PromptState]:
        """One forward pass over what follows the first `start` tokens, which are the kept prefix's."""
        rows = pad_rows(prompts)
        device = self.policy.device
        ids = torch.from_numpy(rows.input_ids).to(device)
        lengths = torch.from_numpy(rows.lengths).to(device)
        columns = torch.arange(ids.shape[1], device=device)
        prefix = None
        if start:
            assert self.prefix is not None
            prefix = self.prefix[:, :, None, :, :start].expand(-1, -1, len(ids), -1, -1, -1)
        cache = cache_of(prefix)
        positions = columns[None, start:].expand(len(ids), -1)
        hidden = read_tokens(self.policy, ids[:, start:], cache, columns[None] < lengths[:, None], positions)
        last = hidden[torch.arange(len(ids), device=device), lengths - 1 - start]
        self.computed_tokens += rows.num_tokens - start * len(prompts)
        kept = cached(cache, start) if keep else None
        return [
            PromptState(
                shared=start,
                length=length,
                hidden=last[row],
                keys_values=None if kept is None else kept[:, :, row, :, : length - start].clone(),
            )
            for row, length in enumerate(rows.lengths.tolist())
        ]

    def _read_trees(
        self, decoder: BlockDecoder, prompts: Sequence[Int[np.ndarray, " P"]], start: int, keep: bool
    ) -> list[PromptState]:
        """The same as trees: what prompts have in common behind the kept prefix is read once as well."""
        device = self.policy.device
        rests = [tuple(prompt[start:].tolist()) for prompt in prompts]
        cuts = [(0, branch) for branch in cut_tree(rests, row_width(rests))]
        groups = group_by_length([len(branch.token_ids) for _, branch in cuts])
        trees = [pad_branches([cuts[index] for index in group]) for group in groups]
        reads: tuple[Read, ...] = ()
        if start:
            assert self.prefix is not None
            keys, values = self.prefix[:, :, None, :, :start].unbind(1)
            reads = (Read(source=Memory(tuple(keys), tuple(values))),)
        blocks = [
            Block(
                token_ids=torch.from_numpy(tree.token_ids).to(device),
                positions=torch.from_numpy(start + tree.depth).to(device),
                own_mask=torch.from_numpy(tree.ancestors()).to(device),
                reads=reads,
            )
            for tree in trees
        ]
        hidden, memories = decoder(blocks, keep=range(len(blocks)) if keep else ())
        place: dict[tuple[int, ...], tuple[int, int, tuple[int, ...]]] = {}
        for number, group in enumerate(groups):
            for row, index in enumerate(group):
                place |= {rest: (number, row, path) for rest, path in cuts[index][1].paths.items()}
        self.computed_tokens += sum(int(tree.lengths.sum()) for tree in trees)
        states = []
        for prompt, rest in zip(prompts, rests, strict=True):
            number, row, path = place[rest]
            kept = None
            if keep:
                memory, columns = memories[number], torch.tensor(path, device=device)
                kept = torch.stack(
                    [
                        torch.stack((keys[row][:, columns], values[row][:, columns]))
                        for keys, values in zip(memory.keys, memory.values, strict=True)
                    ]
                )
            states.append(
                PromptState(shared=start, length=len(prompt), hidden=hidden[number][row, path[-1]], keys_values=kept)
            )
        return states
