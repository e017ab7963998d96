"""Refills: how many episodes are asked for, how rollouts are merged, and that an epoch can be collected again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from lab_made import fit, rollout, small_lab, turn
from sampler_made import credit_of

from msgrpo_lab.sampler.base import Refilling, merge_rollouts
from msgrpo_lab.sampler.dynamic import Dynamic
from msgrpo_lab.sampler.uniform import Uniform
from msgrpo_lab.seeding import refill_seed

GROUP = np.repeat([0, 1, 2, 3], 2)
ONE_OF_FOUR = credit_of([0.0] * 8, returns=[0, 1, 0, 0, 5, 5, 2, 2])
NONE_OF_FOUR = credit_of([0.0] * 8)
# No shaping: an untrained policy on the slippery ice loses nearly always, so most groups have no spread.
SCARCE = ("sampler=dynamic", "env=frozenlake_slippery", "env.shaping=0", "sampler.num_episodes=8")


@pytest.mark.parametrize(
    ("credit", "count", "refills", "wanted"),
    [
        (ONE_OF_FOUR, 2, 0, 0),  # two episodes differ from their group: enough
        (ONE_OF_FOUR, 5, 0, 12),  # three are lacking, and one episode in four will do: 3 · 4
        (ONE_OF_FOUR, 5, 2, 12),
        (ONE_OF_FOUR, 5, 3, 0),  # three refills were allowed
        (NONE_OF_FOUR, 2, 0, 16),  # none has spread: as if one of the eight had
    ],
)
def test_how_many_more_are_wanted(credit, count, refills, wanted):
    sampler = Dynamic(num_episodes=count, max_refills=3)
    assert sampler.episodes_wanted(credit, GROUP, count, refills) == wanted


def test_no_refill_is_wanted_where_none_is_allowed():
    assert Dynamic(num_episodes=5).episodes_wanted(NONE_OF_FOUR, GROUP, 5, 0) == 0


def test_who_refills():
    assert isinstance(Dynamic(num_episodes=1), Refilling)
    assert not isinstance(Uniform(num_episodes=1), Refilling)


def test_merged_groups_keep_apart():
    first = rollout((4, True, [turn(reward=1.0)]), (2, False, [turn(), turn()]))
    second = rollout((4, False, [turn(reward=3.0)]), (7, True, [turn()]))
    merged = merge_rollouts(first, second)
    assert merged.episodes[:2] == first.episodes
    assert [episode.ret for episode in merged.episodes] == [1.0, 0.0, 3.0, 0.0]
    np.testing.assert_array_equal(merged.group_index, [4, 2, 5, 8])
    assert [episode.group_id for episode in merged.episodes] == [4, 2, 5, 8]
    assert [episode.seed for episode in merged.episodes] == [4, 2, 4, 7]
    assert merged.exact_adv is None


def test_merged_oracle_advantages_are_padded():
    first = replace(rollout((0, True, [turn()])), exact_adv=np.array([[1.0]]))
    second = replace(rollout((0, True, [turn(), turn()])), exact_adv=np.array([[2.0, 3.0]]))
    np.testing.assert_array_equal(merge_rollouts(first, second).exact_adv, [[1.0, 0.0], [2.0, 3.0]])
    np.testing.assert_array_equal(merge_rollouts(second, first).exact_adv, [[2.0, 3.0], [1.0, 0.0]])
    assert merge_rollouts(first, replace(second, exact_adv=None)).exact_adv is None


def test_a_refills_seed_is_a_function_of_run_epoch_and_number():
    seeds = {(s, e, n): refill_seed(s, e, n) for s in (0, 1) for e in (0, 1, 2) for n in (1, 2, 3)}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds.values())
    assert refill_seed(1, 2, 3) == seeds[1, 2, 3]


def collected(*overrides, epoch=3):
    lab = small_lab(*SCARCE, *overrides)
    merged, refills = lab.data.pool(epoch, 0)
    return lab, merged, refills


def test_an_epoch_is_refilled_as_often_as_allowed_and_needed():
    lab, merged, refills = collected("sampler.max_refills=2", "sampler.num_episodes=16")
    assert refills == 2
    # 4 groups of 4, and no more in a refill than in a rollout.
    assert 16 < len(merged.episodes) <= 48
    groups, sizes = np.unique(merged.group_index, return_counts=True)
    assert (sizes == 4).all()
    for group in groups:
        assert len({merged.episodes[i].seed for i in np.flatnonzero(merged.group_index == group)}) == 1
    first = lab.data.collect(3, 0)
    assert [e.seed for e in merged.episodes[:16]] == [e.seed for e in first.episodes]
    assert {e.seed for e in merged.episodes[16:]}.isdisjoint(e.seed for e in first.episodes)


def test_the_same_epoch_is_refilled_alike_and_another_is_not():
    def text(batch):
        return [(e.seed, [t.completion.text for t in e.turns]) for e in batch.episodes]

    _, first, _ = collected("sampler.max_refills=2", "sampler.num_episodes=16")
    _, again, _ = collected("sampler.max_refills=2", "sampler.num_episodes=16")
    _, other, _ = collected("sampler.max_refills=2", "sampler.num_episodes=16", epoch=4)
    assert text(first) == text(again)
    assert text(first)[16:] != text(other)[16:]


def test_no_refills_where_none_are_allowed_or_the_sampler_never_asks():
    assert collected("sampler.max_refills=0")[2] == 0
    lab = small_lab("env.shaping=0")
    assert lab.data.pool(0, 0)[1] == 0


def test_training_counts_what_was_refilled():
    lab = small_lab(*SCARCE, "sampler.max_refills=1", "sampler.num_episodes=16")
    memory = fit(lab, epochs=2)
    assert memory.series("train/refills") == [1.0, 1.0]
    assert memory.series("train/drawn_episodes") == [16.0, 16.0]
    episodes = memory.series("train/episodes")
    assert episodes[0] > 16
    assert episodes[-1] == episodes[0] + len(lab.data.rollout.episodes)


def test_a_refilled_run_is_the_same_bits_again():
    def run():
        lab = small_lab(*SCARCE, "sampler.max_refills=1", "sampler.num_episodes=16")
        memory = fit(lab, epochs=2)
        return str(memory.training()), torch.cat([p.detach().flatten() for p in lab.policy.trainable_parameters()])

    (first, first_end), (again, again_end) = run(), run()
    assert first == again
    assert torch.equal(first_end, again_end)


@pytest.mark.parametrize("sampler", ["pods", "dash", "dynamic", "top_variance", "outcome_gated", "positive_only"])
def test_every_sampler_trains(sampler):
    memory = fit(small_lab(f"sampler={sampler}", "sampler.num_episodes=8"), epochs=1)
    assert memory.series("train/drawn_episodes") == [8.0]
    assert 0.0 < memory.series("sampler/ess")[0] <= 1.0
