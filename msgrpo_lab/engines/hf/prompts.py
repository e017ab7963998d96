"""Reading prompts under one policy version: the rules they share once, and then what is left of each.

The first call keeps the keys and values of the longest prefix that its prompts have in common. Later prompts start from
as much of it as they open with, which may be less than all or nothing: causal attention makes any part of it exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from transformers import DynamicCache

from msgrpo_lab.decoder.block_decoder import AttendsTo, Block, BlockDecoder, KeyValues
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
    use_library: bool = False,
) -> Float[torch.Tensor, "B N width"]:
    """Last hidden states of N further tokens a row; `cache` grows by them.

    `mask` marks the real ones among the M tokens so far (causal attention), or says for each of the N tokens which it
    may look at. Padding is on the right, unless it is read with `use_library`, by the model library's own modules.
    """
    return policy.decoder(use_library).extend(token_ids, cache, mask, positions)


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
        reads: tuple[AttendsTo, ...] = ()
        if start:
            assert self.prefix is not None
            keys, values = self.prefix[:, :, None, :, :start].unbind(1)
            reads = (AttendsTo(source=KeyValues(tuple(keys), tuple(values))),)
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


ROW_COLUMNS = {"cpu": 1024}
"""Tokens that a row of texts looks at before the row is cut: each of its new tokens looks at all of them."""
ROW_COLUMNS_ELSEWHERE = 16384
"""The same on accelerators, where the number of operations counts more."""
SMALL_ROW = 16
"""A row of fewer texts is not cut: a row more costs more than the wide row does."""
GROWTH = 1.5
"""A full store gets so many times the room."""


class Text(NamedTuple):
    """A text whose last token has been read."""

    shared: int
    """Leading tokens that are the shared prefix's."""
    columns: Int[np.ndarray, " n"]
    """Columns of the tokens behind them, ascending."""

    @property
    def length(self) -> int:
        """Tokens."""
        return self.shared + len(self.columns)


class TextPool:
    """Keys and values of texts under one policy version.

    Args:
        reader: has read the prompts that the texts begin with.
    """

    def __init__(self, reader: PromptReader) -> None:
        self.reader = reader
        self.length = 0
        """Columns filled, those of the shared prefix (the first ones) included."""
        self._store: Float[torch.Tensor, "J 2 G C D"] | None = None
        self._prefix = 0
        device = reader.policy.device.type
        self.row_columns = ROW_COLUMNS.get(device, ROW_COLUMNS_ELSEWHERE)

    @property
    def tokens(self) -> int:
        """Tokens held beside those of the shared prefix."""
        return self.length - self._prefix

    def forget(self) -> None:
        """Lets all texts go."""
        self._store, self.length, self._prefix = None, 0, 0

    def add(self, states: Sequence[PromptState]) -> list[Text]:
        """Prompts, read with their keys and values, as texts."""
        if self._store is None and self.reader.prefix is not None:
            self._prefix = self.reader.prefix.shape[-2]
            self._append(self.reader.prefix)
        texts = []
        for state in states:
            if state.keys_values is None:
                raise ValueError("prompts to be continued must be read with keep=True")
            columns = self._append(state.keys_values)
            texts.append(Text(shared=state.shared, columns=columns))
        return texts

    @torch.no_grad()
    def extend(
        self,
        texts: Sequence[Text],
        token_ids: Int[np.ndarray, " D"],
        parents: Sequence[int] | None = None,
    ) -> tuple[list[Text], Float[torch.Tensor, "D H"]]:
        """Each text with one token more, and the hidden states after it; all in one call of the block decoder.

        No value is read from the device here.

        Args:
            texts: what each token follows. They should come prompt by prompt, so that texts that share columns share a
                row.
            token_ids: the tokens.
            parents: the token of this very call that each one follows instead, always an earlier one; −1 where it
                follows its text. Texts of a token and of those that follow it are the same one, and come one after
                another. None: all follow their texts.
        """
        parents = [-1] * len(texts) if parents is None else parents
        rows = list(self._rows(texts, parents))
        decoder, device = self.reader.decoder, self.reader.policy.device
        ahead = _ancestors(parents)
        depth = np.array([text.length for text in texts], dtype=np.int64) + ahead.sum(axis=1) - 1
        tokens, positions = torch.from_numpy(token_ids).to(device), torch.from_numpy(depth).to(device)
        blocks, hidden, added = list[Block](), list[torch.Tensor](), list[KeysValues]()
        for row, columns, seen in rows:
            assert self._store is not None
            read = self._store.index_select(-2, torch.from_numpy(columns).to(device))
            mask = torch.from_numpy(seen).to(device)[None]
            own = torch.from_numpy(ahead[row, row]).to(device)[None]
            some, places = tokens[None, row], positions[None, row]
            if decoder is None:
                cache = cache_of(read[:, :, None])
                all_seen = torch.cat([mask, own], dim=2)[:, None]
                hidden.append(read_tokens(self.reader.policy, some, cache, all_seen, places)[0])
                added.append(cached(cache, len(columns))[:, :, 0])
                continue
            keys, values = read[:, :, None].unbind(1)
            memory = KeyValues(tuple(keys), tuple(values))
            reads = (AttendsTo(source=memory, mask=mask),)
            blocks.append(Block(token_ids=some, positions=places, own_mask=own, reads=reads))
        if decoder is not None:
            states, memories = decoder(blocks, keep=range(len(blocks)))
            hidden = [state[0] for state in states]
            added = [
                torch.stack([torch.stack((k[0], v[0])) for k, v in zip(kept.keys, kept.values, strict=True)])
                for kept in memories
            ]
        columns = np.concatenate([self._append(part) for part in added])
        longer = [
            Text(shared=text.shared, columns=np.append(text.columns, columns[seen]))
            for text, seen in zip(texts, ahead, strict=True)
        ]
        return longer, torch.cat(hidden)

    def _rows(
        self, texts: Sequence[Text], parents: Sequence[int]
    ) -> Iterator[tuple[slice, Int[np.ndarray, " M"], Bool[np.ndarray, "D M"]]]:
        """The texts cut into rows: which ones, the columns they look at, and which of these each of them sees."""
        start, seen = 0, set[int]()
        for number, (text, parent) in enumerate(zip(texts, parents, strict=True)):
            added = seen.union(text.columns.tolist())
            wide = self._prefix + len(added) > self.row_columns
            if parent < 0 and wide and number - start >= SMALL_ROW:
                yield self._row(texts, slice(start, number), seen)
                start, added = number, set(text.columns.tolist())
            seen = added
        yield self._row(texts, slice(start, len(texts)), seen)

    def _row(
        self, texts: Sequence[Text], row: slice, own: set[int]
    ) -> tuple[slice, Int[np.ndarray, " M"], Bool[np.ndarray, "D M"]]:
        some = texts[row]
        columns = np.concatenate([np.arange(self._prefix), np.array(sorted(own), dtype=np.int64)])
        seen = np.zeros((len(some), len(columns)), dtype=bool)
        seen[:, : self._prefix] = np.arange(self._prefix) < np.array([text.shared for text in some])[:, None]
        of_text = np.repeat(np.arange(len(some)), [len(text.columns) for text in some])
        seen[of_text, columns.searchsorted(np.concatenate([text.columns for text in some]))] = True
        return row, columns, seen

    def _append(self, keys_values: KeysValues) -> Int[np.ndarray, " n"]:
        """Writes keys and values of further tokens; returns their columns."""
        count = keys_values.shape[-2]
        stop = self.length + count
        room = 0 if self._store is None else self._store.shape[-2]
        if stop > room:
            wider = keys_values.new_empty(*keys_values.shape[:-2], max(stop, int(GROWTH * room)), keys_values.shape[-1])
            if self._store is not None:
                wider[..., : self.length, :] = self._store[..., : self.length, :]
            self._store = wider
        assert self._store is not None
        self._store[..., self.length : stop, :] = keys_values
        columns = np.arange(self.length, stop)
        self.length = stop
        return columns


def _ancestors(parents: Sequence[int]) -> Bool[np.ndarray, "D D"]:
    """Which tokens of a call each of them sees: itself and those it follows."""
    seen = np.eye(len(parents), dtype=bool)
    for number, parent in enumerate(parents):
        if parent >= 0:
            seen[number] |= seen[parent]
    return seen
