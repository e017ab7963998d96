"""A forward pass as arrays: what is read, where tokens are predicted, and the way back to the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Int

from msgrpo_lab.decoder.decoding import ChoiceTrie
from msgrpo_lab.decoder.tree import Branches, Forest, Read, passes
from msgrpo_lab.types import TrainBatch


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
    use_library: bool = False
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


def build_forward_plan(
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


Sharing = Literal["tree", "rows", "none"]
"""`tree`: distinct beginnings once; `rows`: each distinct text as a row of its own; `none`: each sample as a row of its
own, nothing shared, which is the plain reference that the others are tested against."""


def plan_forward(
    batch: TrainBatch, trie: ChoiceTrie | None, token_budget: int, sharing: Sharing = "tree"
) -> list[ForwardPlan]:
    """Splits a batch into forward passes of at most `token_budget` padded tokens (but at least one row) each.

    All samples of a text are served by one pass, and texts that begin alike by the same one if they fit. Whole rows are
    sorted by length, so that a pass pads little. A sample with an empty completion has nothing to predict and is in no
    pass.

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
        return build_forward_plan(
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
        node_row=np.array(node_row, dtype=np.int64),
        node_col=np.array(node_col, dtype=np.int64),
        branches=(),
    )


def _tree_plans(distinct: _Distinct, trie: ChoiceTrie | None, token_budget: int) -> list[ForwardPlan]:
    """Passes over trees of texts."""
    members: dict[Read, list[int]] = {}
    for index, (prompt, written) in enumerate(zip(distinct.prompts, distinct.completions, strict=True)):
        members.setdefault((*prompt.tolist(), *written[:-1]), []).append(index)
    return [_tree_plan(texts, forest, members, distinct, trie) for texts, forest in passes(members, token_budget)]


def _tree_plan(
    texts: Sequence[Read],
    forest: Forest,
    members: Mapping[Read, Sequence[int]],
    distinct: _Distinct,
    trie: ChoiceTrie | None,
) -> ForwardPlan:
    """The pass over the texts of a forest."""
    chosen = [index for text in texts for index in members[text]]
    # A text predicts at its last tokens, one for each of the completion's. Nodes are kept apart by which of them they
    # predict, too: where one prompt is another with the beginning of an answer, a constraint leaves each other tokens.
    span = max(len(distinct.completions[index]) for index in chosen)
    predicting = [
        np.array(forest.places[text][-len(distinct.completions[index]) :]) * span
        + np.arange(len(distinct.completions[index]))
        for text in texts
        for index in members[text]
    ]
    nodes = np.unique(np.concatenate(predicting))
    place_N = nodes // span
    rows = pad_rows([np.array(root, dtype=np.int64) for root in forest.roots])
    ends = rows.lengths.cumsum()
    in_roots = place_N[: place_N.searchsorted(ends[-1])]
    node_row = ends.searchsorted(in_roots, side="right")
    branches, first = [], int(ends[-1])
    for group in forest.branches:
        start, stop = place_N.searchsorted((first, first + group.token_ids.size))
        branches.append(replace(group, nodes=place_N[start:stop] - first))
        first += group.token_ids.size
    return distinct.plan(
        chosen,
        [nodes.searchsorted(keys).tolist() for keys in predicting],
        trie,
        rows=rows,
        node_row=node_row,
        node_col=in_roots - (ends - rows.lengths)[node_row],
        branches=tuple(branches),
    )
