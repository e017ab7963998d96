"""Texts that are continued token by token: the keys and values of all their tokens side by side, each once.

A *text* is a path through the pool: the columns its tokens stand in. Texts that begin alike go through the same
columns, however many there are and whenever they are continued; a step's cost is its distinct new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from msgrpo_lab.decoder.block_decoder import Block, Memory, Read
from msgrpo_lab.rollout.reading import KeysValues, PromptReader, PromptState, cache_of, cached, read_tokens

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
            memory = Memory(tuple(keys), tuple(values))
            reads = (Read(source=memory, mask=mask),)
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
