"""Each distinct piece of work once: what the model must really read, and how its results return to the samples.

A forward pass has three levels, each of which reads the keys and values of those before it:

1. the beginning that all prompts of the pass have in common, read once;
2. the distinct prompts, each from there on;
3. the completions of each prompt as a tree (`tree.py`): tokens that are read after a prompt, each distinct beginning of
   a completion once. The last token of a completion is predicted and never read.

A *node* is a position at which a next token is predicted: the end of a prompt, or a token of level 3. A *pair* is a
node together with a token that some sample holds there. Log-probabilities are computed per pair and gathered to the
samples; autograd adds the gradients up, so the gathering is exact for any loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int

from msgrpo_lab.lap.decoding import ChoiceTrie
from msgrpo_lab.lap.plan import ForwardPlan, distributed, pad_rows, padded_tokens
from msgrpo_lab.lap.tree import Branch, Read, cut_tree, group_by_length, pad_branches
from msgrpo_lab.types import TrainBatch

MIN_SHARED_PREFIX = 8
"""Shorter common prefixes are not worth a call of their own."""

Sharing = Literal["tree", "rows", "none"]
"""`tree`: the three levels; `rows`: each distinct prompt and read as a row of its own, read as a whole; `none`: each
sample as a row of its own, nothing shared, which is the plain reference that the others are tested against."""


def plan_forward(
    batch: TrainBatch, trie: ChoiceTrie | None, token_budget: int, sharing: Sharing = "tree"
) -> list[ForwardPlan]:
    """Splits a batch into forward passes of at most `token_budget` padded tokens (but at least one row) each.

    Rows are sorted by length, so that a pass holds rows of like length. All samples of a prompt (of a row, where there
    is no tree) are served by one pass; only the completions of a prompt that exceeds the budget by itself are split
    over several. A sample with an empty completion has nothing to predict and is in no pass.

    Raises:
        ValueError: a completion without a prompt, one that is none of the legal answers, or an unknown `sharing`.
    """
    if sharing not in get_args(Sharing):
        raise ValueError(f"sharing={sharing!r} is unknown: use one of {', '.join(get_args(Sharing))}")
    distinct = _distinct(batch, merge=sharing != "none")
    if sharing == "tree":
        return _tree_plans(distinct, trie, token_budget)
    return _row_plans(distinct, trie, token_budget, merge=sharing != "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Distinct:
    """The distinct samples of a batch: equal prompt, equal completion, equal columns."""

    prompts: list[Int[np.ndarray, " P"]]
    completions: list[Read]
    starts: Int[np.ndarray, " D"]
    """First completion column."""
    of_sample: Int[np.ndarray, " S"]
    """−1 for a sample with an empty completion."""
    width: int
    """Columns of the batch."""

    def plan(
        self, chosen: Sequence[int], nodes: Sequence[Sequence[int]], trie: ChoiceTrie | None, **read: Any
    ) -> ForwardPlan:
        """The pass that serves the distinct samples `chosen`, whose tokens are predicted at `nodes`."""
        place = np.full(len(self.completions) + 1, -1, dtype=np.int64)  # one more, for the −1 of empty completions
        place[list(chosen)] = np.arange(len(chosen))
        place_S = place[self.of_sample]
        samples = np.flatnonzero(place_S >= 0)
        return distributed(
            samples=samples,
            distinct_of=place_S[samples],
            starts=self.starts[list(chosen)],
            tokens=[self.completions[index] for index in chosen],
            nodes=nodes,
            trie=trie,
            width=self.width,
            **read,
        )


def _distinct(batch: TrainBatch, merge: bool) -> _Distinct:
    """Finds the distinct samples; without `merge`, each sample is one. Padding may stand on either side."""
    ids, completion = batch.input_ids.cpu().numpy(), batch.completion_mask.cpu().numpy()
    read = batch.attention_mask.cpu().numpy()
    count, width = ids.shape
    begins, starts = read.argmax(axis=1), completion.argmax(axis=1)
    ends = np.where(completion.any(axis=1), width - completion[:, ::-1].argmax(axis=1), 0)
    if (without := (ends > 0) & (starts <= begins)).any():
        raise ValueError(f"sample {int(without.argmax())}: a completion without a prompt; give it at least one token")
    if merge:
        # Only the columns in which samples differ are compared, as one string of bytes a sample.
        shown = np.where(read, ids, -1)
        differing = shown[:, (shown != shown[:1]).any(axis=0)]
        signature = np.column_stack([begins, starts, ends, differing]).astype(np.int64)
        flat, size = signature.tobytes(), signature.shape[1] * signature.itemsize
        number: dict[bytes, int] = {}
        keys = [flat[place : place + size] for place in range(0, count * size, size)]
        group = np.array([number.setdefault(key, len(number)) for key in keys], dtype=np.int64)
        _, first = np.unique(group, return_index=True)
    else:
        group = first = np.arange(count)
    served = ends[first] > 0
    renumbered = np.where(served, served.cumsum() - 1, -1)
    first = first[served]
    return _Distinct(
        prompts=[ids[s, begins[s] : starts[s]] for s in first],
        completions=[tuple(ids[s, starts[s] : ends[s]].tolist()) for s in first],
        starts=starts[first],
        of_sample=renumbered[group],
        width=width,
    )


def _row_plans(distinct: _Distinct, trie: ChoiceTrie | None, token_budget: int, merge: bool) -> list[ForwardPlan]:
    """Passes over whole rows, prompts with their reads; without `merge`, one for each sample."""
    row_of_key: dict[object, int] = {}
    members: list[list[int]] = []
    for index, (prompt, written) in enumerate(zip(distinct.prompts, distinct.completions, strict=True)):
        key = (prompt.tobytes(), written[:-1]) if merge else index
        row = row_of_key.setdefault(key, len(members))
        if row == len(members):
            members.append([])
        members[row].append(index)

    def length(of_row: Sequence[int]) -> int:
        return len(distinct.prompts[of_row[0]]) + len(distinct.completions[of_row[0]]) - 1

    passes: list[list[list[int]]] = []
    for of_row in sorted(members, key=length):
        if not passes or (len(passes[-1]) + 1) * length(of_row) > token_budget:
            passes.append([])
        passes[-1].append(of_row)
    return [_row_plan(distinct, of_pass, trie) for of_pass in passes]


def _row_plan(distinct: _Distinct, members: Sequence[Sequence[int]], trie: ChoiceTrie | None) -> ForwardPlan:
    """The pass over the rows that the distinct samples `members` are in."""
    rows, node_row, node_col = list[Int[np.ndarray, " P"]](), list[int](), list[int]()
    chosen, nodes = list[int](), list[Sequence[int]]()
    for row, of_row in enumerate(members):
        prompt, written = distinct.prompts[of_row[0]], distinct.completions[of_row[0]]
        rows.append(np.concatenate([prompt, np.array(written[:-1], dtype=np.int64)]))
        path = range(len(node_row), len(node_row) + len(written))
        node_row += [row] * len(written)
        node_col += range(len(prompt) - 1, len(rows[-1]))
        chosen += of_row
        nodes += [path] * len(of_row)
    return distinct.plan(
        chosen,
        nodes,
        trie,
        rows=pad_rows(rows),
        shared=0,
        node_row=np.array(node_row, dtype=np.int64),
        node_col=np.array(node_col, dtype=np.int64),
        branches=(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A prompt and some of its branches, with the distinct samples that they serve."""

    prompt: Int[np.ndarray, " P"]
    branches: tuple[Branch, ...]
    members: dict[Read, list[int]]
    """Read → distinct samples."""

    def part(self, start: int, stop: int) -> _Piece:
        """The piece with the branches from `start` to `stop` only; single tokens go with the first branch."""
        kept = self.branches[start:stop]
        reads = {read for branch in kept for read in branch.paths} | ({()} if start == 0 else set())
        members = {read: served for read, served in self.members.items() if read in reads}
        return _Piece(prompt=self.prompt, branches=kept, members=members)


@dataclass(slots=True)
class _Filling:
    """A pass while it is being filled with pieces, in ascending order of prompt length."""

    pieces: list[_Piece] = field(default_factory=list)
    common: int = 0
    """Leading tokens that all prompts have in common, leaving every prompt at least one."""
    num_branches: int = 0
    widest: int = 0
    """Tokens of the longest branch."""

    def common_with(self, prompt: Int[np.ndarray, " P"]) -> int:
        """What `common` would be with this prompt, which is no shorter than the others."""
        if not self.pieces:
            return len(prompt) - 1
        same = self.pieces[0].prompt[: self.common] == prompt[: self.common]
        return self.common if same.all() else int(same.argmin())

    def cost_with(self, prompt: Int[np.ndarray, " P"], branches: Sequence[Branch]) -> int:
        """Padded tokens at most, if this prompt came in with these branches."""
        count = len(self.pieces) + 1
        rows = padded_tokens((count, len(prompt)), _read_once(count, self.common_with(prompt)))
        widest = max([self.widest, *(len(branch.token_ids) for branch in branches)])
        return rows + (self.num_branches + len(branches)) * widest

    def add(self, piece: _Piece) -> None:
        """Takes a piece in."""
        self.common = self.common_with(piece.prompt)
        self.pieces.append(piece)
        self.num_branches += len(piece.branches)
        self.widest = max([self.widest, *(len(branch.token_ids) for branch in piece.branches)])


def _read_once(rows: int, common: int) -> int:
    """How many of the common leading tokens are worth a call of their own."""
    return common if rows > 1 and common >= MIN_SHARED_PREFIX else 0


def _tree_plans(distinct: _Distinct, trie: ChoiceTrie | None, token_budget: int) -> list[ForwardPlan]:
    """Passes over the three levels."""
    prompts: dict[bytes, tuple[Int[np.ndarray, " P"], dict[Read, list[int]]]] = {}
    for index, (prompt, written) in enumerate(zip(distinct.prompts, distinct.completions, strict=True)):
        _, members = prompts.setdefault(prompt.tobytes(), (prompt, {}))
        members.setdefault(written[:-1], []).append(index)
    passes = [_Filling()]
    for prompt, members in sorted(prompts.values(), key=lambda item: len(item[0])):
        whole = _Piece(prompt=prompt, branches=tuple(cut_tree(members)), members=members)
        if passes[-1].cost_with(prompt, whole.branches) <= token_budget:
            passes[-1].add(whole)
            continue
        # It opens a pass of its own; what exceeds the budget even there goes to further ones.
        for part in _parts(whole, token_budget):
            passes.append(_Filling())
            passes[-1].add(part)
    return [_tree_plan(filling, distinct, trie) for filling in passes if filling.pieces]


def _parts(piece: _Piece, token_budget: int) -> Iterator[_Piece]:
    """The piece in as few parts as each fit the budget, with at least one branch each."""
    start, count = 0, len(piece.branches)
    while True:
        stop, widest = start, 0
        while stop < count:
            widest = max(widest, len(piece.branches[stop].token_ids))
            if stop > start and len(piece.prompt) + (stop + 1 - start) * widest > token_budget:
                break
            stop += 1
        yield piece.part(start, stop)
        if stop == count:
            return
        start = stop


def _tree_plan(filling: _Filling, distinct: _Distinct, trie: ChoiceTrie | None) -> ForwardPlan:
    """The pass over the pieces; its first nodes are the ends of the prompts, in order."""
    pieces = filling.pieces
    branches = [(row, branch) for row, piece in enumerate(pieces) for branch in piece.branches]
    groups = group_by_length([len(branch.token_ids) for _, branch in branches])
    chosen, nodes = list[int](), list[Sequence[int]]()
    for row, piece in enumerate(pieces):
        for index in piece.members.get((), []):
            chosen.append(index)
            nodes.append((row,))
    first = len(pieces)
    for row, branch in (branches[index] for group in groups for index in group):
        for read, path in branch.paths.items():
            predicting = (row, *(first + column for column in path))
            for index in pieces[row].members[read]:
                chosen.append(index)
                nodes.append(predicting)
        first += len(branch.token_ids)
    rows = pad_rows([piece.prompt for piece in pieces])
    return distinct.plan(
        chosen,
        nodes,
        trie,
        rows=rows,
        shared=_read_once(len(pieces), filling.common),
        node_row=np.arange(len(pieces)),
        node_col=rows.lengths - 1,
        branches=tuple(pad_branches([branches[index] for index in group]) for group in groups),
    )
