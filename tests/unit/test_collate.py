"""From drawn episodes to rows and mini-batches, on a rollout made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from lab_made import rollout, turn

from msgrpo_lab.training.collate import collate, select_columns, split_episodes
from msgrpo_lab.types import Credit, RolloutBatch, Selection, TrainBatch


@pytest.fixture
def batch() -> RolloutBatch:
    return rollout(
        (0, False, [turn(prompt=(1, 2), tokens=(5,), logprobs=(-0.5,))]),
        (0, False, [turn(prompt=(1, 2, 3), tokens=(6, 7), logprobs=(-1.0, -2.0)), turn(prompt=(4,), tokens=(8,))]),
        (1, False, [turn(prompt=(9,), tokens=(9,))] * 3),
    )


CREDIT = Credit(
    turn_adv=np.array([[0.5, 0, 0], [-1.0, -2.0, 0], [3.0, 4.0, 5.0]]),
    turn_mask=np.array([[True, False, False], [True, True, False], [True, False, True]]),
    episode_adv=np.array([0.5, -1.5, 4.0]),
)


def drawn(*index: int, weight: tuple[float, ...] | None = None) -> Selection:
    return Selection(
        index=np.array(index),
        prob=np.full(3, 1 / 3),
        weight=np.array(weight if weight else [1.0] * len(index)),
        inclusion=np.full(3, len(index) / 3),
    )


def test_rows_hold_the_tokens_that_were_sampled(batch: RolloutBatch) -> None:
    made = collate(batch, CREDIT, drawn(0, 1))
    assert made.input_ids.tolist() == [[1, 2, 5, 0, 0], [1, 2, 3, 6, 7], [4, 8, 0, 0, 0]]
    assert made.attention_mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert made.completion_mask.int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 0, 0]]
    assert made.old_logprobs.tolist() == [[0, 0, -0.5, 0, 0], [0, 0, 0, -1.0, -2.0], [0, -0.5, 0, 0, 0]]
    assert made.ref_logprobs is None


def test_each_row_carries_its_turns_numbers(batch: RolloutBatch) -> None:
    made = collate(batch, CREDIT, drawn(1, 0, weight=(2.0, 0.25)))
    assert made.advantage.tolist() == [-1.0, -2.0, 0.5]
    assert made.weight.tolist() == [2.0, 2.0, 0.25]
    assert made.num_turns.tolist() == [2, 2, 1]
    assert made.episode.tolist() == [0, 0, 1]
    assert made.turn.tolist() == [0, 1, 0]
    assert (made.num_episodes, made.num_tokens) == (2, 4)


def test_types_are_the_models_own(batch: RolloutBatch) -> None:
    made = collate(batch, CREDIT, drawn(0))
    assert {made.input_ids.dtype, made.num_turns.dtype, made.episode.dtype, made.turn.dtype} == {torch.int64}
    assert {made.old_logprobs.dtype, made.advantage.dtype, made.weight.dtype} == {torch.float32}
    assert {made.attention_mask.dtype, made.completion_mask.dtype} == {torch.bool}


def test_an_episode_drawn_twice_counts_as_two(batch: RolloutBatch) -> None:
    made = collate(batch, CREDIT, drawn(1, 1))
    assert made.episode.tolist() == [0, 0, 1, 1]
    assert made.turn.tolist() == [0, 1, 0, 1]
    assert (made.num_episodes, made.num_tokens) == (2, 6)


def test_turns_that_credit_masks_are_left_out_but_count_as_turns(batch: RolloutBatch) -> None:
    made = collate(batch, CREDIT, drawn(2))
    assert made.turn.tolist() == [0, 2]
    assert made.advantage.tolist() == [3.0, 5.0]
    assert made.num_turns.tolist() == [3, 3]


def test_nothing_to_train_on_is_told(batch: RolloutBatch) -> None:
    nothing = Credit(turn_adv=CREDIT.turn_adv, turn_mask=np.zeros((3, 3), dtype=bool), episode_adv=CREDIT.episode_adv)
    with pytest.raises(ValueError, match=r"^sampler: the drawn episodes have no turn to train on$"):
        collate(batch, nothing, drawn(0, 1))


def many() -> TrainBatch:
    """Seven drawn episodes of one to three turns."""
    episodes = [(0, False, [turn(tokens=(5,) * (1 + e % 2))] * (1 + e % 3)) for e in range(7)]
    adv = np.arange(21, dtype=float).reshape(7, 3)
    mask = np.arange(3) < np.array([1 + e % 3 for e in range(7)])[:, None]
    credit = Credit(turn_adv=adv, turn_mask=mask, episode_adv=np.zeros(7))
    selection = Selection(index=np.arange(7), prob=np.full(7, 1 / 7), weight=np.ones(7), inclusion=np.ones(7))
    return collate(rollout(*episodes), credit, selection)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_minibatches_are_a_partition_of_whole_episodes(parts: int) -> None:
    whole = many()
    pieces = split_episodes(whole, parts, np.random.default_rng(0))
    assert len(pieces) == parts
    members = [set(piece.episode.tolist()) for piece in pieces]
    assert sorted(e for member in members for e in member) == list(range(7))
    assert sum(len(piece.input_ids) for piece in pieces) == len(whole.input_ids)
    assert max(map(len, members)) - min(map(len, members)) <= 1
    for piece, member in zip(pieces, members, strict=True):
        expected = [adv for adv, e in zip(whole.advantage.tolist(), whole.episode.tolist(), strict=True) if e in member]
        assert piece.advantage.tolist() == expected


@pytest.mark.parametrize("parts", [2, 3])
def test_each_minibatch_is_normalised_by_itself(parts: int) -> None:
    for piece in split_episodes(many(), parts, np.random.default_rng(0)):
        assert piece.num_episodes == len(set(piece.episode.tolist()))
        assert piece.num_tokens == int(piece.completion_mask.sum())


def test_one_part_is_the_batch_itself_and_draws_nothing() -> None:
    whole, rng = many(), np.random.default_rng(0)
    (piece,) = split_episodes(whole, 1, rng)
    assert piece is whole
    assert rng.random() == np.random.default_rng(0).random()


def test_each_pass_splits_anew() -> None:
    whole, rng = many(), np.random.default_rng(0)
    first, second = (split_episodes(whole, 2, rng)[0].episode.tolist() for _ in range(2))
    assert first != second


def test_an_episode_whose_turns_are_all_masked_counts_in_the_normaliser(batch: RolloutBatch) -> None:
    mask = np.array([[False] * 3, [True, True, False], [False] * 3])
    credit = Credit(turn_adv=CREDIT.turn_adv, turn_mask=mask, episode_adv=CREDIT.episode_adv)
    made = collate(batch, credit, drawn(0, 1))
    assert made.num_episodes == 2
    assert made.episode.tolist() == [1, 1]


def test_turns_that_hold_one_and_the_same_completion_are_rows_of_their_own() -> None:
    one, other = turn(prompt=(1, 2), tokens=(5,)), turn(prompt=(3,), tokens=(6, 7), logprobs=(-1.0, -2.0))
    credit = Credit(
        turn_adv=np.arange(6.0).reshape(2, 3), turn_mask=np.ones((2, 3), dtype=bool), episode_adv=np.ones(2)
    )
    selection = Selection(index=np.arange(2), prob=np.full(2, 0.5), weight=np.ones(2), inclusion=np.ones(2))
    made = collate(rollout((0, False, [one, other, one]), (0, False, [other, one, one])), credit, selection)
    assert made.input_ids.tolist() == [[1, 2, 5], [3, 6, 7], [1, 2, 5], [3, 6, 7], [1, 2, 5], [1, 2, 5]]
    assert made.advantage.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert made.old_logprobs[3].tolist() == [0.0, -1.0, -2.0]
    assert made.num_tokens == 8


def test_narrowing_cuts_columns_of_per_token_fields_and_nothing_else() -> None:
    whole = many()
    whole = replace(whole, ref_logprobs=whole.old_logprobs - 1)
    part = select_columns(whole, slice(3, 5))
    for field in ("input_ids", "attention_mask", "completion_mask", "old_logprobs", "ref_logprobs"):
        assert torch.equal(getattr(part, field), getattr(whole, field)[:, 3:5]), field
    for field in ("advantage", "weight", "num_turns", "episode", "turn"):
        assert torch.equal(getattr(part, field), getattr(whole, field)), field
    assert (part.num_episodes, part.num_tokens) == (whole.num_episodes, whole.num_tokens)
    assert select_columns(many(), slice(0, 1)).ref_logprobs is None
