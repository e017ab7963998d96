"""A batch's distinct texts as trees of tokens, cut into forward passes.

A *text* is a prompt and what is read of a completion (all but its last token). Texts are sorted, so that those which
begin alike are neighbours. In a pass, what all texts with one first token have in common is a *root*, a plain row; what
follows is the tree of their continuations, packed into rows of bounded width (`tree.py`). So every distinct beginning
of a text is computed once, whether it ends in the rules, in an observation or in a completion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from msgrpo_lab.lap.tree import Branches, Read, cut_tree, group_by_length, pad_branches

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
