"""The completions of a prompt as a tree of tokens, cut into rows that the model reads in few calls.

A *read* is a completion without its last token (which is predicted, never read). The reads of one prompt share their
beginnings, so they are the paths of a tree. Sorted, they visit the tree depth first; a row takes paths in that order
until it is full, and the next row repeats only the ancestors of its own first path. In a row a token attends to the
prompt, to its ancestors and to itself, so it sees exactly what it would see in a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

BRANCH_TOKENS = 64
"""Tokens of a row of completions; a single longer path makes a longer row."""
CALL_TOKENS = 64
"""What one more call of the model costs, as tokens: padding beyond that is saved by a call of its own."""

Read = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Some paths of one prompt's tree, as a row."""

    token_ids: tuple[int, ...]
    parent: tuple[int, ...]
    """Column of the token before, always further left; −1 where that is the prompt's last."""
    depth: tuple[int, ...]
    """Completion tokens before this one."""
    paths: dict[Read, tuple[int, ...]]
    """Columns of each read's tokens; every read that the row serves is a key."""


def cut_tree(reads: Iterable[Read], width: int = BRANCH_TOKENS) -> list[Branch]:
    """Rows of at most `width` tokens (but at least one path each) that hold every read; empty reads need no row."""
    branches: list[Branch] = []
    tokens, parents, depths = list[int](), list[int](), list[int]()
    paths: dict[Read, tuple[int, ...]] = {}
    last, path = Read(), list[int]()

    def close() -> None:
        branches.append(Branch(token_ids=tuple(tokens), parent=tuple(parents), depth=tuple(depths), paths=dict(paths)))
        for filled in (tokens, parents, depths, path, paths):
            filled.clear()

    for read in sorted(set(reads) - {()}):
        common = _common(last, read)
        if tokens and len(tokens) + len(read) - common > width:
            close()
            common = 0
        del path[common:]
        for depth in range(common, len(read)):
            parents.append(path[-1] if path else -1)
            path.append(len(tokens))
            tokens.append(read[depth])
            depths.append(depth)
        paths[read], last = tuple(path), read
    if tokens:
        close()
    return branches


def _common(one: Read, other: Read) -> int:
    """Length of the common beginning."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Branches:
    """Branches of any prompts, padded on the right to one array: one call of the model."""

    prompt: Int[np.ndarray, " B"]
    """Row of the prompt that each continues."""
    token_ids: Int[np.ndarray, "B W"]
    parent: Int[np.ndarray, "B W"]
    depth: Int[np.ndarray, "B W"]
    lengths: Int[np.ndarray, " B"]
    nodes: Int[np.ndarray, " n"]
    """Places of the B · W, row by row, at which a token is predicted; never descending."""

    @property
    def real(self) -> Bool[np.ndarray, "B W"]:
        """Where there is a token and no padding."""
        return np.arange(self.token_ids.shape[1]) < self.lengths[:, None]

    def ancestors(self) -> Bool[np.ndarray, "B W W"]:
        """Which columns of its row each column attends to: itself and its ancestors."""
        rows, width = self.token_ids.shape
        seen_BWW = np.zeros((rows, width, width), dtype=bool)
        every = np.arange(rows)
        for column in range(width):
            parent = self.parent[:, column]
            seen_BWW[:, column] = seen_BWW[every, parent] & (parent >= 0)[:, None]
            seen_BWW[:, column, column] = True
        return seen_BWW


def pad_branches(branches: Sequence[tuple[int, Branch]]) -> Branches:
    """(prompt row, branch) pairs as one array, with a node at every token."""
    lengths = np.array([len(branch.token_ids) for _, branch in branches], dtype=np.int64)
    shape = (len(branches), int(lengths.max()))
    token_ids, depth = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    parent = np.full(shape, -1, dtype=np.int64)
    for row, (_, branch) in enumerate(branches):
        length = len(branch.token_ids)
        token_ids[row, :length], parent[row, :length], depth[row, :length] = (
            branch.token_ids,
            branch.parent,
            branch.depth,
        )
    prompt = np.array([prompt for prompt, _ in branches], dtype=np.int64)
    nodes = np.flatnonzero(np.arange(shape[1]) < lengths[:, None])
    return Branches(prompt=prompt, token_ids=token_ids, parent=parent, depth=depth, lengths=lengths, nodes=nodes)


def group_by_length(lengths: Sequence[int], call_tokens: int = CALL_TOKENS) -> list[list[int]]:
    """Indices of rows in groups, each padded to its longest row, so that padded tokens and calls cost least.

    Rows are sorted by length and the best cuts of that order are found by dynamic programming over distinct lengths.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    ends = [n + 1 for n in range(len(order)) if n + 1 == len(order) or lengths[order[n]] < lengths[order[n + 1]]]
    best: dict[int, tuple[int, int]] = {0: (0, 0)}
    """Rows so far → least cost of them, and where the last group begins."""
    for end in ends:
        longest = lengths[order[end - 1]]
        best[end] = min((cost + call_tokens + (end - start) * longest, start) for start, (cost, _) in best.items())
    groups, end = list[list[int]](), len(order)
    while end:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]
