"""Each distinct piece of work once: what the model must really read, and how its results return to the samples.

A *text* is a prompt and what is read of its completion: all but the last token, which is predicted and never read. The
texts of a forward pass form trees (`forest.py`): whatever they begin with alike, the rules, half an observation or
half an answer, is computed once.

A *node* is a position at which a next token is predicted: the end of a prompt, or a token of an answer. A *pair* is a
node together with a token that some sample holds there. Log-probabilities are computed per pair and gathered to the
samples; autograd adds the gradients up, so the gathering is exact for any loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int

from msgrpo_lab.lap.decoding import ChoiceTrie
from msgrpo_lab.lap.forest import Forest, passes
from msgrpo_lab.lap.plan import ForwardPlan, distributed, pad_rows
from msgrpo_lab.lap.tree import Read
from msgrpo_lab.types import TrainBatch

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
