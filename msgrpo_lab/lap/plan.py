"""A forward pass as arrays: what is read, where tokens are predicted, and the way back to the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from msgrpo_lab.lap.decoding import ChoiceTrie
from msgrpo_lab.lap.tree import Branches


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Token rows, padded on the right with 0."""

    input_ids: Int[np.ndarray, "U L"]
    lengths: Int[np.ndarray, " U"]

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())

    def shared_prefix(self) -> int:
        """Length of the longest prefix that all rows have in common, leaving every row at least one token."""
        shortest = int(self.lengths.min())
        same = (self.input_ids[:, :shortest] == self.input_ids[0, :shortest]).all(axis=0)
        common = shortest if same.all() else int(same.argmin())
        return min(common, shortest - 1)


def pad_rows(rows: Sequence[Int[np.ndarray, " P"]]) -> Rows:
    """Rows of unequal length as one right-padded array."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    input_ids = np.zeros((len(rows), int(lengths.max(initial=0))), dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row
    return Rows(input_ids=input_ids, lengths=lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPlan:
    """One forward pass: what is read, the nodes in it, and the way back to the samples it serves."""

    samples: Int[np.ndarray, " M"]
    """Which samples of the batch this pass serves; ascending."""
    rows: Rows
    """What texts begin with; without a tree, texts as a whole."""
    node_row: Int[np.ndarray, " R"]
    node_col: Int[np.ndarray, " R"]
    """The first R nodes are these positions of `rows`."""
    branches: tuple[Branches, ...]
    """Trees that read the rows. The other N − R nodes are the nodes of these, in order."""
    node_allowed: Bool[np.ndarray, "N A"] | None
    """Columns that the constraint admits at each node; None with free decoding."""
    pair_node: Int[np.ndarray, " Q"]
    """Ascending."""
    pair_column: Int[np.ndarray, " Q"]
    """Column of the pair's token: its id, or its place among the constraint's columns."""
    pair_of: Int[np.ndarray, "M L"]
    """Pair of each sample's token; Q off the completion."""
    plain: bool = False
    """Read by the model library's own modules, as the reference for everything faster."""

    @property
    def num_nodes(self) -> int:
        """Positions at which a token is predicted, N."""
        return len(self.node_row) + sum(len(group.nodes) for group in self.branches)

    @property
    def num_tokens(self) -> int:
        """Tokens the model reads, without padding."""
        return self.rows.num_tokens + sum(int(group.lengths.sum()) for group in self.branches)

    @property
    def num_padded_tokens(self) -> int:
        """Tokens the model reads, with padding."""
        return self.rows.input_ids.size + sum(g.token_ids.size for g in self.branches)

    @property
    def num_attended(self) -> int:
        """Keys that the tokens read attend to, added up without padding: a token at position p attends to p + 1."""
        lengths = self.rows.lengths
        total = int((lengths * (lengths + 1) // 2).sum())
        for group in self.branches:
            keys = lengths[group.prompt][:, None] + group.depth + 1
            total += int(keys[group.real].sum())
        return total

    @property
    def columns(self) -> slice:
        """The columns of the batch that the completions of its samples lie in."""
        used = np.flatnonzero((self.pair_of < len(self.pair_node)).any(axis=0))
        return slice(int(used[0]), int(used[-1]) + 1)


def distributed(
    *,
    samples: Int[np.ndarray, " M"],
    distinct_of: Int[np.ndarray, " M"],
    starts: Int[np.ndarray, " D"],
    tokens: Sequence[Sequence[int]],
    nodes: Sequence[Sequence[int]],
    trie: ChoiceTrie | None,
    width: int,
    rows: Rows,
    node_row: Int[np.ndarray, " R"],
    node_col: Int[np.ndarray, " R"],
    branches: tuple[Branches, ...],
) -> ForwardPlan:
    """The plan of a pass, from where each distinct sample's tokens are predicted.

    Args:
        samples: the samples it serves.
        distinct_of: which distinct sample each of them is, 0 to D − 1.
        starts: first completion column of each distinct sample.
        tokens: completion of each distinct sample.
        nodes: the node that predicts each of these tokens.
        trie: the constraint.
        width: columns of the batch, L.
        rows: see `ForwardPlan`; so the rest.

    Raises:
        ValueError: a completion is none of the legal answers.
    """
    sizes = np.array([len(written) for written in tokens], dtype=np.int64)
    node = np.concatenate([np.asarray(path, dtype=np.int64) for path in nodes])
    column = np.concatenate([np.asarray(written, dtype=np.int64) for written in tokens])
    allowed = None
    if trie is not None:
        states = {tuple(written): trie.states(np.asarray(written)) for written in set(map(tuple, tokens))}
        state_of = np.zeros(len(node_row) + sum(len(group.nodes) for group in branches), dtype=np.int64)
        state_of[node] = np.concatenate([states[tuple(written)] for written in tokens])
        allowed = trie.allowed[state_of]
        column = trie.columns.searchsorted(column)
    span = int(column.max()) + 1
    keys, pair = np.unique(node * span + column, return_inverse=True)
    pair_of_DL = np.full((len(tokens), width), len(keys), dtype=np.int64)
    before = np.repeat(sizes.cumsum() - sizes, sizes)
    columns = np.repeat(starts, sizes) + np.arange(len(node)) - before
    pair_of_DL[np.repeat(np.arange(len(tokens)), sizes), columns] = pair
    return ForwardPlan(
        samples=samples,
        rows=rows,
        node_row=node_row,
        node_col=node_col,
        branches=branches,
        node_allowed=allowed,
        pair_node=keys // span,
        pair_column=keys % span,
        pair_of=pair_of_DL[distinct_of],
    )
