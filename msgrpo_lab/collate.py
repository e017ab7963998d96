"""From drawn episodes to a training batch: one row a turn. Nothing is re-tokenised."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from msgrpo_lab.types import Credit, RolloutBatch, Selection, TrainBatch


def collate(batch: RolloutBatch, credit: Credit, selection: Selection) -> TrainBatch:
    """The turns of the drawn episodes as right-padded rows, in drawing order. Turns that credit masks are left out.

    Raises:
        ValueError: no turn is left.
    """
    samples = [
        (place, index, number, turn)
        for place, index in enumerate(selection.index.tolist())
        for number, turn in enumerate(batch.episodes[index].turns)
        if credit.turn_mask[index, number]
    ]
    if not samples:
        raise ValueError("sampler: the drawn episodes have no turn to train on")
    prompt_length = np.array([len(turn.completion.prompt_ids) for *_, turn in samples])
    length = prompt_length + np.array([len(turn.completion.token_ids) for *_, turn in samples])
    shape = (len(samples), int(length.max()))
    input_ids = np.zeros(shape, dtype=np.int64)
    old_logprobs = np.zeros(shape, dtype=np.float32)
    for row, (*_, turn) in enumerate(samples):
        start, end = prompt_length[row], length[row]
        input_ids[row, :start] = turn.completion.prompt_ids
        input_ids[row, start:end] = turn.completion.token_ids
        old_logprobs[row, start:end] = turn.completion.logprobs
    columns = np.arange(shape[1])
    place, index, number = (np.array(column) for column in zip(*(sample[:3] for sample in samples), strict=True))
    return TrainBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(columns < length[:, None]),
        completion_mask=torch.from_numpy((columns >= prompt_length[:, None]) & (columns < length[:, None])),
        old_logprobs=torch.from_numpy(old_logprobs),
        ref_logprobs=None,
        advantage=torch.from_numpy(credit.turn_adv[index, number].astype(np.float32)),
        weight=torch.from_numpy(selection.weight[place].astype(np.float32)),
        num_turns=torch.from_numpy(batch.num_turns[index]),
        episode=torch.from_numpy(place),
        turn=torch.from_numpy(number),
        num_episodes=len(selection.index),
        num_tokens=int((length - prompt_length).sum()),
    )


def narrowed(batch: TrainBatch, columns: slice) -> TrainBatch:
    """The same samples with some columns of the per-token fields only."""
    reference = batch.ref_logprobs
    return replace(
        batch,
        input_ids=batch.input_ids[:, columns],
        attention_mask=batch.attention_mask[:, columns],
        completion_mask=batch.completion_mask[:, columns],
        old_logprobs=batch.old_logprobs[:, columns],
        ref_logprobs=None if reference is None else reference[:, columns],
    )


def split_episodes(batch: TrainBatch, parts: int, rng: np.random.Generator) -> list[TrainBatch]:
    """Mini-batches, each an optimiser step of its own over a random share of the episodes (one part: all, in order)."""
    if parts == 1:
        return [batch]
    pieces = []
    for episodes in np.array_split(rng.permutation(batch.num_episodes), parts):
        chosen = torch.isin(batch.episode, torch.from_numpy(episodes))
        piece = batch.select(torch.nonzero(chosen).flatten())
        pieces.append(piece.normalised(num_episodes=len(episodes), num_tokens=int(piece.completion_mask.sum())))
    return pieces
