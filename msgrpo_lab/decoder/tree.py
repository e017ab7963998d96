"""The completions of a prompt as a tree of tokens, cut into rows that the model reads in few calls.

A *read* is a completion without its last token (which is predicted, never read). The reads of one prompt share their
beginnings, so they are the paths of a tree. Sorted, they visit the tree depth first; a row takes paths in that order
until it is full, and the next row repeats only the ancestors of its own first path. In a row a token attends to the
prompt, to its ancestors and to itself, so it sees exactly what it would see in a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

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


ROW_TOKENS = 128
"""Tokens of a packed row at least; a token attends to all of its row, so wider rows cost more and repeat less."""
PATHS_A_ROW = 3
"""A row holds this many of the longest continuations, where they need more than `ROW_TOKENS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forest:
    """One pass: roots, and the packed continuations that read them."""

    roots: list[Read]
    branches: tuple[Branches, ...]
    """Without their `nodes`."""
    places: dict[Read, tuple[int, ...]]
    """Text → where each of its tokens is: tokens are numbered root by root, then array by array, row by row, column
    by column, with the padding of arrays (not of roots) counted."""

    @property
    def padded_tokens(self) -> int:
        """Tokens the model reads, padding of both included."""
        roots = len(self.roots) * max(map(len, self.roots))
        return roots + sum(group.token_ids.size for group in self.branches)


def grow(texts: Iterable[Read]) -> Forest:
    """The forest of some texts of at least one token each."""
    ordered = sorted(set(texts))
    roots, cuts, families = list[Read](), [], list[list[Read]]()
    for _, same in groupby(ordered, key=lambda text: text[0]):
        family = list(same)
        roots.append(_beginning(family[0], family[-1]))  # the extremes of sorted texts share least
        families.append(family)
    for number, (root, family) in enumerate(zip(roots, families, strict=True)):
        rests = [text[len(root) :] for text in family]
        cuts += [(number, branch) for branch in cut_tree(rests, row_width(rests))]
    arrays = [[cuts[index] for index in group] for group in group_by_length([len(b.token_ids) for _, b in cuts])]
    branches = tuple(pad_branches(array) for array in arrays)
    first_of_root = np.cumsum([0, *map(len, roots)]).tolist()
    places: dict[Read, tuple[int, ...]] = {}
    for number, (root, family) in enumerate(zip(roots, families, strict=True)):
        if family[0] == root:
            places[root] = tuple(range(first_of_root[number], first_of_root[number + 1]))
    first = first_of_root[-1]
    for array, padded in zip(arrays, branches, strict=True):
        for number, branch in array:
            before = tuple(range(first_of_root[number], first_of_root[number + 1]))
            for rest, path in branch.paths.items():
                places[roots[number] + rest] = (*before, *(first + column for column in path))
            first += padded.token_ids.shape[1]
    return Forest(roots=roots, branches=branches, places=places)


def row_width(rests: Iterable[Read]) -> int:
    """Tokens that a row which packs these continuations may hold."""
    return max(ROW_TOKENS, PATHS_A_ROW * max(map(len, rests)))


def passes(texts: Iterable[Read], token_budget: int) -> Iterator[tuple[list[Read], Forest]]:
    """Sorted texts in passes of at most `token_budget` padded tokens, or of one text."""
    ordered = sorted(set(texts))
    if not ordered:
        return
    forest = grow(ordered)
    if len(ordered) == 1 or forest.padded_tokens <= token_budget:
        yield ordered, forest
        return
    half = len(ordered) // 2
    yield from passes(ordered[:half], token_budget)
    yield from passes(ordered[half:], token_budget)


def _beginning(one: Sequence[int], other: Sequence[int]) -> Read:
    """The common beginning of two texts."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return tuple(one[:count])
