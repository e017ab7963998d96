"""From drawn episodes to a training batch: one row a turn. Nothing is re-tokenised."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from msgrpo_lab.types import Completion, Credit, RolloutBatch, Selection, TrainBatch


def collate(batch: RolloutBatch, credit: Credit, selection: Selection) -> TrainBatch:
    """The turns of the drawn episodes as right-padded rows, in drawing order. Turns that credit masks are left out.

    Raises:
        ValueError: no turn is left.
    """
    number_of: dict[int, int] = {}
    completions: list[Completion] = []
    place_S, index_S, turn_S, completion_S = list[int](), list[int](), list[int](), list[int]()
    for drawn, episode in enumerate(selection.index.tolist()):
        credited = credit.turn_mask[episode].tolist()
        for position, turn in enumerate(batch.episodes[episode].turns):
            if not credited[position]:
                continue
            # Episodes that gave the same answer to the same prompt often hold one and the same object.
            distinct = number_of.setdefault(id(turn.completion), len(completions))
            if distinct == len(completions):
                completions.append(turn.completion)
            place_S.append(drawn)
            index_S.append(episode)
            turn_S.append(position)
            completion_S.append(distinct)
    if not completions:
        raise ValueError("sampler: the drawn episodes have no turn to train on")
    place, index, number, of_sample = (np.array(column) for column in (place_S, index_S, turn_S, completion_S))
    prompt_length = np.array([len(completion.prompt_ids) for completion in completions])
    length = prompt_length + np.array([len(completion.token_ids) for completion in completions])
    shape = (len(completions), int(length.max()))
    columns = np.arange(shape[1])
    read_DL = columns < length[:, None]
    written_DL = read_DL & (columns >= prompt_length[:, None])
    input_ids, old_logprobs = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    input_ids[read_DL] = np.concatenate([part for c in completions for part in (c.prompt_ids, c.token_ids)])
    old_logprobs[written_DL] = np.concatenate([completion.logprobs for completion in completions])
    return TrainBatch(
        input_ids=torch.from_numpy(input_ids[of_sample]),
        attention_mask=torch.from_numpy(read_DL[of_sample]),
        completion_mask=torch.from_numpy(written_DL[of_sample]),
        old_logprobs=torch.from_numpy(old_logprobs[of_sample]),
        ref_logprobs=None,
        advantage=torch.from_numpy(credit.turn_adv[index, number].astype(np.float32)),
        weight=torch.from_numpy(selection.weight[place].astype(np.float32)),
        num_turns=torch.from_numpy(batch.num_turns[index]),
        episode=torch.from_numpy(place),
        turn=torch.from_numpy(number),
        num_episodes=len(selection.index),
        num_tokens=int((length - prompt_length)[of_sample].sum()),
    )


def select_columns(batch: TrainBatch, columns: slice) -> TrainBatch:
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
