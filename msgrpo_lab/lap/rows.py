"""Each distinct piece of work once: which rows the model must really see, and how their results return to the samples.

A sample's *input row* is its prompt and its completion without the last token (which is predicted, never read). Samples
with equal input rows share one row. A *node* is a position of a row at which a next token is predicted; a *pair* is a
node together with a token that some sample holds there. Log-probabilities are computed per pair and gathered to the
samples; autograd adds the gradients up, so the gathering is exact for any loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from msgrpo_lab.lap.decoding import ChoiceTrie
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
    """One forward pass: distinct rows, the nodes in them, and the way back to the samples it serves."""

    samples: Int[np.ndarray, " M"]
    """Which samples of the batch this pass serves."""
    rows: Rows
    node_row: Int[np.ndarray, " N"]
    node_col: Int[np.ndarray, " N"]
    node_allowed: Bool[np.ndarray, "N A"] | None
    """Columns that the constraint admits at each node; None with free decoding."""
    pair_node: Int[np.ndarray, " Q"]
    """Ascending."""
    pair_column: Int[np.ndarray, " Q"]
    """Column of the pair's token: its id, or its place among the constraint's columns."""
    pair_of: Int[np.ndarray, "M L"]
    """Pair of each sample's token; Q off the completion."""


def plan_forward(batch: TrainBatch, trie: ChoiceTrie | None, token_budget: int) -> list[ForwardPlan]:
    """Splits a batch into forward passes of at most `token_budget` padded tokens (but at least one row) each.

    Rows are sorted by length, so that a pass holds rows of like length. All samples of a row are served by one pass.
    """
    input_ids, completion = batch.input_ids.cpu().numpy(), batch.completion_mask.cpu().numpy()
    ends = np.where(completion.any(axis=1), completion.shape[1] - completion[:, ::-1].argmax(axis=1), 0)
    starts = completion.argmax(axis=1)
    row_of_key: dict[bytes, int] = {}
    rows: list[Int[np.ndarray, " P"]] = []
    samples_of_row: list[list[int]] = []
    for sample, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if end == 0:
            continue  # an empty completion has nothing to predict
        row = input_ids[sample, : end - 1]
        key = row.tobytes() + start.to_bytes(4, "little")
        index = row_of_key.setdefault(key, len(rows))
        if index == len(rows):
            rows.append(row)
            samples_of_row.append([])
        samples_of_row[index].append(sample)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    plans, chunk = [], list[int]()
    for index in order:
        if chunk and (len(chunk) + 1) * len(rows[index]) > token_budget:
            plans.append(_plan(chunk, rows, samples_of_row, input_ids, starts, ends, trie))
            chunk = []
        chunk.append(index)
    if chunk:
        plans.append(_plan(chunk, rows, samples_of_row, input_ids, starts, ends, trie))
    return plans


def _plan(
    chunk: Sequence[int],
    rows: Sequence[Int[np.ndarray, " P"]],
    samples_of_row: Sequence[Sequence[int]],
    input_ids: Int[np.ndarray, "S L"],
    starts: Int[np.ndarray, " S"],
    ends: Int[np.ndarray, " S"],
    trie: ChoiceTrie | None,
) -> ForwardPlan:
    """The plan of one pass over the rows in `chunk`."""
    samples: list[int] = []
    node_row: list[int] = []
    node_col: list[int] = []
    states: list[int] = []
    pair_of_key: dict[tuple[int, int], int] = {}
    pairs_of_sample: list[list[int]] = []
    for local, index in enumerate(chunk):
        start = int(starts[samples_of_row[index][0]])
        first_node = len(node_row)
        columns = range(start - 1, len(rows[index]))
        node_row += [local] * len(columns)
        node_col += columns
        for place, sample in enumerate(samples_of_row[index]):
            tokens = input_ids[sample, start : int(ends[sample])]
            if trie is not None:
                if place == 0:
                    states += trie.states(tokens)
                tokens = np.array([trie.column(token) for token in tokens.tolist()])
            samples.append(sample)
            pairs_of_sample.append(
                [
                    pair_of_key.setdefault((first_node + offset, token), len(pair_of_key))
                    for offset, token in enumerate(tokens.tolist())
                ]
            )
    keys = np.array(list(pair_of_key), dtype=np.int64).reshape(-1, 2)
    by_node = np.argsort(keys[:, 0], kind="stable")
    rank = np.empty_like(by_node)
    rank[by_node] = np.arange(len(by_node))
    pair_of = np.full((len(samples), input_ids.shape[1]), len(keys), dtype=np.int64)
    for place, (sample, pairs) in enumerate(zip(samples, pairs_of_sample, strict=True)):
        start = int(starts[sample])
        pair_of[place, start : start + len(pairs)] = rank[pairs]
    return ForwardPlan(
        samples=np.array(samples, dtype=np.int64),
        rows=pad_rows([rows[index] for index in chunk]),
        node_row=np.array(node_row, dtype=np.int64),
        node_col=np.array(node_col, dtype=np.int64),
        node_allowed=None if trie is None else trie.allowed[states],
        pair_node=keys[by_node, 0],
        pair_column=keys[by_node, 1],
        pair_of=pair_of,
    )
