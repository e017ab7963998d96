"""The policy's action probabilities, and exact advantages written into a rollout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from lab_made import small_lab

from msgrpo_lab.fidelity.action_probs import ActionTable, TableMaker, exact_table, sampled_table
from msgrpo_lab.fidelity.truth import LakeTruth, annotate, lake_truth
from msgrpo_lab.oracle.lake_values import INVALID, lakes_of
from msgrpo_lab.training.assemble import Lab
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.types import RolloutBatch

LAKE = ("env=frozenlake_slippery", "env.horizon=5", "rollout.num_groups=6")


@pytest.fixture(scope="module")
def lab() -> Lab:
    return small_lab(*LAKE)


@pytest.fixture(scope="module")
def batch(lab: Lab) -> RolloutBatch:
    return lab.data.collect(0, 0)


def maker(lab: Lab, **changes: object) -> TableMaker:
    data = lab.data
    sampling = replace(data.sampling, **changes)
    return partial(exact_table, policy=data.policy, prompt=data.collector.prompt, game=game(lab), sampling=sampling)


def game(lab: Lab) -> TextGame:
    return lab.data.collector.example_game


@pytest.fixture(scope="module")
def truth(lab: Lab, batch: RolloutBatch) -> LakeTruth:
    return lake_truth(batch, game=game(lab), table_of=maker(lab))


def texts_of(batch: RolloutBatch) -> list[str]:
    return sorted({turn.observation for episode in batch.episodes for turn in episode.turns})


# Action probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{}, {"temperature": 1.7}, {"top_k": 2}, {"top_p": 0.6}], ids=str)
def test_exact_probabilities_are_those_the_engine_samples_with(lab: Lab, rule: dict[str, object]) -> None:
    data = lab.data
    other = replace(data.sampling, **rule)
    data.engine.sync(data.policy, 0)
    rollout = data.collector.collect(
        seeds=[1, 2, 3],
        group_size=4,
        members=range(12),
        engine=data.engine,
        sampling=other,
        rngs=np.random.default_rng(0).spawn(12),
    )
    table = maker(lab, **rule)(texts_of(rollout))
    assert table.exact
    np.testing.assert_allclose(table.prob_XB.sum(axis=1), 1.0, atol=1e-12)
    assert (table.prob_XB[:, INVALID] == 0).all()
    for turn in (turn for episode in rollout.episodes for turn in episode.turns):
        probability = table.prob_of[turn.observation][turn.parsed.action]
        assert np.log(probability) == pytest.approx(float(turn.completion.logprobs.sum()), abs=1e-5)
    if "top_k" in rule:
        assert ((table.prob_XB > 0).sum(axis=1) == 2).all()


def test_greedy_probabilities_are_one_for_the_answer_that_is_taken(lab: Lab, batch: RolloutBatch) -> None:
    texts = texts_of(batch)
    sampled, greedy = maker(lab)(texts), maker(lab, greedy=True)(texts)
    assert (greedy.prob_XB.max(axis=1) == 1).all()
    assert (greedy.prob_XB.argmax(axis=1) == sampled.prob_XB.argmax(axis=1)).all()


def test_probabilities_follow_the_policy(batch: RolloutBatch) -> None:
    """Not those of an earlier version, or of the prompt: moved weights give other probabilities."""
    lab = small_lab(*LAKE)
    before = maker(lab)(texts_of(batch)).prob_XB
    with torch.no_grad():
        for parameter in lab.data.policy.trainable_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    after = maker(lab)(texts_of(batch)).prob_XB
    assert np.abs(after - before).max() > 0.01


def test_a_word_that_the_parser_does_not_read_counts_as_bottom(lab: Lab, batch: RolloutBatch) -> None:
    """Φ is the prompt's own parser: if it reads 'Left' as nothing, that probability is ⊥'s."""

    class Deaf:
        def __init__(self) -> None:
            self.inner = lab.data.collector.prompt

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def parse(self, text: str, legal: tuple[str, ...]) -> object:
            return self.inner.parse("nothing" if "Left" in text else text, legal)

    texts = texts_of(batch)
    heard = maker(lab)(texts)
    missed = partial(maker(lab), prompt=Deaf())(texts)
    np.testing.assert_allclose(missed.prob_XB[:, INVALID], heard.prob_XB[:, 0], atol=1e-12)
    assert (missed.prob_XB[:, 0] == 0).all()


def test_sampled_probabilities_are_near_the_exact_ones(lab: Lab, batch: RolloutBatch) -> None:
    data, texts = lab.data, texts_of(batch)
    data.engine.sync(data.policy, 0)
    exact = maker(lab)(texts)
    make = partial(
        sampled_table, engine=data.engine, prompt=data.collector.prompt, game=game(lab), sampling=data.sampling
    )
    sampled = make(texts, completions=400, rng=np.random.default_rng(0))
    assert not sampled.exact
    np.testing.assert_allclose(sampled.prob_XB.sum(axis=1), 1.0, atol=1e-12)
    assert (np.abs(sampled.prob_XB - exact.prob_XB) <= 4 * sampled.standard_error_XB).all()
    assert (sampled.standard_error_XB > 0).all(), "what was never drawn may still be possible"
    assert sampled.standard_error_XB.max() < 0.03
    z_XB = (sampled.prob_XB - exact.prob_XB)[:, :INVALID] / sampled.standard_error_XB[:, :INVALID]
    assert 0.8 < np.sqrt(np.mean(z_XB**2)) < 1.2, "the error that is stated is the error that is made"
    again = make(texts, completions=400, rng=np.random.default_rng(0))
    assert (again.prob_XB == sampled.prob_XB).all()
    with pytest.raises(ValueError, match="completions=1: must be at least 2"):
        make(texts, completions=1, rng=np.random.default_rng(0))


def test_free_decoding_is_estimated_and_not_taken_for_exact(lab: Lab) -> None:
    free = small_lab(*LAKE, "rollout.sampling.constrain=false", "rollout.sampling.max_new_tokens=2")
    data = free.data
    rollout = data.collect(0, 0)
    texts = texts_of(rollout)[:5]
    table = sampled_table(
        texts,
        engine=data.engine,
        prompt=data.collector.prompt,
        game=game(free),
        sampling=data.sampling,
        completions=50,
        rng=np.random.default_rng(0),
    )
    assert table.prob_XB[:, INVALID].max() > 0.5, "random weights hardly name an action by themselves"
    with pytest.raises(ValueError, match=r"rollout\.sampling\.constrain=false: exact action probabilities need"):
        maker(free)(texts)


def test_rows_can_be_picked_from_a_kept_table(lab: Lab, batch: RolloutBatch) -> None:
    table = maker(lab)(texts_of(batch))
    picked = table.select(table.texts[3:0:-1])
    assert picked.texts == table.texts[3:0:-1]
    assert (picked.prob_XB == table.prob_XB[3:0:-1]).all()
    with pytest.raises(ValueError, match="texts: 1 of 2 are not in the table, the first 'elsewhere'"):
        table.select([table.texts[0], "elsewhere"])


@pytest.mark.parametrize("texts", [[], ["here", "here"]])
def test_no_texts_and_repeated_ones_are_refused(lab: Lab, texts: list[str]) -> None:
    with pytest.raises(ValueError, match=f"texts: {len(texts)} given, {len(set(texts))} distinct"):
        maker(lab)(texts)


# Exact advantages of a rollout --------------------------------------------------------------------------------------


def test_exact_advantages_stand_at_each_turn(lab: Lab, batch: RolloutBatch, truth: LakeTruth) -> None:
    """Looked up one by one, by map, turn, cell and answer."""
    annotated = annotate(batch, game=game(lab), table_of=maker(lab))
    assert annotated.episodes is batch.episodes
    assert annotated.exact_adv is not None
    assert annotated.exact_adv.shape == (len(batch.episodes), batch.num_turns.max())
    lakes = {lake.key: number for number, lake in enumerate(truth.values.model.lakes)}
    for row, episode in zip(annotated.exact_adv, batch.episodes, strict=True):
        for time, turn in enumerate(episode.turns):
            key, state = turn.state_key
            expected = truth.values.advantage_MTSB[lakes[key], time, state, turn.parsed.action]
            assert row[time] == pytest.approx(expected, abs=1e-9)
        assert (row[episode.length :] == 0).all()
    assert np.abs(annotated.exact_adv).max() > 0.01


def test_bottom_has_the_last_column(lab: Lab, batch: RolloutBatch, truth: LakeTruth) -> None:
    episode = batch.episodes[0]
    silent = replace(episode.turns[0], parsed=replace(episode.turns[0].parsed, action=None))
    changed = replace(batch, episodes=(replace(episode, turns=(silent, *episode.turns[1:])), *batch.episodes[1:]))
    index = truth.turns(changed)
    assert index.answer[0, 0] == INVALID
    adv = truth.values.advantage_MTSB[index.lake[0, 0], 0, index.state[0, 0], INVALID]
    assert truth.advantages(changed)[0, 0] == adv < -0.9, "the penalty is paid"


def test_groups_on_one_map_share_it(lab: Lab) -> None:
    """Each distinct map is computed once, and weighs by the episodes that were played on it, whatever their seeds."""
    data = lab.data
    lakes = lakes_of(game(lab), range(300))
    one, other = next((a, b) for b in range(300) for a in range(b) if lakes[a] is lakes[b])
    different = next(seed for seed in range(300) if lakes[seed] is not lakes[one])
    data.engine.sync(data.policy, 0)
    rollout = data.collector.collect(
        seeds=[one, other, different],
        group_size=2,
        members=range(6),
        engine=data.engine,
        sampling=data.sampling,
        rngs=np.random.default_rng(1).spawn(6),
    )
    truth = lake_truth(rollout, game=game(lab), table_of=maker(lab))
    assert len(truth.values.model.lakes) == 2
    gradient_XB = truth.gradient(rollout)
    single = [
        lake_truth(part, game=game(lab), table_of=maker(lab))
        for part in (
            replace(rollout, episodes=rollout.episodes[:4], group_index=rollout.group_index[:4]),
            replace(rollout, episodes=rollout.episodes[4:], group_index=rollout.group_index[4:]),
        )
    ]
    for text, row in truth.texts.row_of.items():
        expected = sum(
            weight * one.gradient(RolloutBatch(episodes=part, group_index=np.zeros(len(part))))[one.texts.row_of[text]]
            for weight, one, part in zip(
                (2 / 3, 1 / 3), single, (rollout.episodes[:4], rollout.episodes[4:]), strict=True
            )
            if text in one.texts.row_of
        )
        np.testing.assert_allclose(gradient_XB[row], expected, atol=1e-9)


def test_exact_advantages_induce_the_exact_gradient_on_average() -> None:
    """Over 2,000 sampled episodes the induced gradient points where the exact one does, and is as long."""
    lab = small_lab("env=frozenlake", "env.horizon=4", "rollout.num_groups=8", "rollout.group_size=250")
    rollout = lab.data.collect(0, 0)
    truth = lake_truth(rollout, game=game(lab), table_of=maker(lab))
    exact_XB = truth.gradient(rollout)
    induced_XB = truth.induced(rollout, truth.advantages(rollout))
    cosine = (exact_XB * induced_XB).sum() / np.linalg.norm(exact_XB) / np.linalg.norm(induced_XB)
    assert cosine > 0.95
    assert np.linalg.norm(induced_XB) == pytest.approx(np.linalg.norm(exact_XB), rel=0.15)


def test_a_rollout_of_other_settings_is_told(lab: Lab, batch: RolloutBatch, truth: LakeTruth) -> None:
    """Other maps for the same seeds, other texts for the same cells, other seeds."""
    other_maps = FrozenLake(size=4, frozen_probability=0.6, slippery=True, horizon=5)
    with pytest.raises(ValueError, match=r"episode 0: was played on the map .* give the env settings of the rollout"):
        annotate(batch, game=other_maps, table_of=maker(lab))
    other_view = FrozenLake(size=4, frozen_probability=0.9, slippery=True, horizon=5, observation="paper")
    with pytest.raises(ValueError, match="reads otherwise than seed"):
        annotate(batch, game=other_view, table_of=uniform_table)
    unknown = replace(batch, episodes=(replace(batch.episodes[0], seed=123), *batch.episodes[1:]))
    with pytest.raises(ValueError, match="seed=123: not among the seeds of this truth"):
        truth.turns(unknown)


def uniform_table(texts: object) -> ActionTable:
    known = tuple(texts)
    return ActionTable(
        texts=known, prob_XB=np.full((len(known), 5), 0.2), standard_error_XB=np.zeros((len(known), 5)), exact=True
    )


def test_a_game_without_an_oracle_is_told_in_one_line(batch: RolloutBatch) -> None:
    snake = small_lab("env=snake")
    with pytest.raises(ValueError, match="env=Snake: has no exact values; use a Frozen Lake scenario") as told:
        annotate(batch, game=game(snake), table_of=uniform_table)
    assert "\n" not in str(told.value)
