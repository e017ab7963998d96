"""When a run asks the oracle, of which policy, and what that leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from lab_made import fit, move, small_lab

from msgrpo_lab.fidelity.action_probs import exact_table, table_maker
from msgrpo_lab.fidelity.truth import lake_truth
from msgrpo_lab.training.assemble import Lab
from msgrpo_lab.types import RolloutBatch

EXACT = ("env=frozenlake_slippery", "env.horizon=5", "credit=exact")
# No shaping: hardly a group has spread, so the sampler asks for refills.
REFILLED = (*EXACT, "env.shaping=0", "sampler=dynamic", "sampler.num_episodes=16", "sampler.max_refills=2")
FREE = ("rollout.sampling.constrain=false", "rollout.truth_completions=8")


def advantages_now(lab: Lab, rollout: RolloutBatch) -> np.ndarray:
    """The exact advantages of the rollout's turns under the policy as it is now, asked beside the data module."""
    data = lab.data
    game, prompt = data.collector.example_game, data.collector.prompt
    truth = lake_truth(
        rollout,
        game=game,
        table_of=lambda texts: exact_table(
            texts, policy=lab.policy, prompt=prompt, game=game, sampling=data.sampling, token_budget=data.token_budget
        ),
    )
    return truth.advantages(rollout)


def test_credit_that_needs_an_oracle_gets_the_advantages_of_the_policy_that_sampled() -> None:
    lab = small_lab(*EXACT)
    before, _ = lab.data.pool(0, 0)
    assert before.exact_adv is not None
    assert np.abs(before.exact_adv).max() > 0
    np.testing.assert_array_equal(before.exact_adv, advantages_now(lab, before))
    move(lab.policy, scale=0.3)
    assert np.abs(advantages_now(lab, before) - before.exact_adv).max() > 1e-4, "another policy, other advantages"
    after, _ = lab.data.pool(1, 1)
    np.testing.assert_array_equal(after.exact_adv, advantages_now(lab, after))


def test_credit_is_read_from_them() -> None:
    lab = small_lab(*EXACT, "credit.normalise=none")
    rollout, _ = lab.data.pool(0, 0)
    np.testing.assert_array_equal(lab.data.assign(rollout).turn_adv, rollout.exact_adv)


def test_refills_are_annotated_as_well() -> None:
    """All groups of the pool, also those that were played after the sampler had first been asked."""
    lab = small_lab(*REFILLED)
    pool, refills = lab.data.pool(3, 0)
    assert refills == 2
    assert pool.exact_adv is not None
    assert pool.exact_adv.shape == (len(pool.episodes), int(pool.num_turns.max()))
    np.testing.assert_array_equal(pool.exact_adv, advantages_now(lab, pool))
    assert lab.data.truth is not None
    assert set(lab.data.truth.map_of_seed) == {episode.seed for episode in pool.episodes}


def test_others_are_answered_in_the_epochs_they_ask_for() -> None:
    lab = small_lab("env=frozenlake")
    asked: list[int] = []

    def wants(epoch: int) -> bool:
        asked.append(epoch)
        return epoch == 1

    lab.data.truth_askers.append(wants)
    told = []
    for epoch in range(3):
        rollout, _ = lab.data.pool(epoch, epoch)
        told.append((lab.data.truth is not None, rollout.exact_adv is not None))
    assert asked == [0, 1, 2]
    assert told == [(False, False), (True, True), (False, False)], "what an earlier epoch was told is not kept"


def test_nobody_asks_by_default() -> None:
    lab = small_lab("env=frozenlake")
    assert lab.data.pool(0, 0)[0].exact_adv is None
    assert lab.data.truth is None


def test_free_answers_are_estimated_from_so_many_completions() -> None:
    lab, again = small_lab(*EXACT, *FREE), small_lab(*EXACT, *FREE)
    rollout, _ = lab.data.pool(0, 0)
    truth = lab.data.truth
    assert truth is not None
    assert not truth.table.exact
    count_XB = truth.table.prob_XB * 8
    np.testing.assert_allclose(count_XB, np.round(count_XB), atol=1e-9)
    assert (truth.table.standard_error_XB > 0).all()
    np.testing.assert_array_equal(again.data.pool(0, 0)[0].exact_adv, rollout.exact_adv)
    first = truth.table.prob_XB
    lab.data.pool(1, 0)
    assert lab.data.truth is not None
    rows = [lab.data.truth.texts.row_of[text] for text in truth.table.texts if text in lab.data.truth.texts.row_of]
    kept = [truth.texts.row_of[text] for text in truth.table.texts if text in lab.data.truth.texts.row_of]
    assert not np.array_equal(lab.data.truth.table.prob_XB[rows], first[kept]), "another epoch draws anew"


@pytest.mark.parametrize("decoding", [(), FREE], ids=["constrained", "free"])
def test_asking_changes_no_number_of_the_run(decoding: tuple[str, ...]) -> None:
    """Not what is learnt, nor what the rollout says it has read."""
    rows = []
    for ask in (False, True):
        lab = small_lab("env=frozenlake", *decoding)
        lab.data.truth_askers.append(lambda _, ask=ask: ask)  # type: ignore[misc]
        memory = fit(lab, epochs=2)
        assert (lab.data.truth is not None) is ask
        assert all((seconds > 0) is ask for seconds in memory.series("perf/truth_s"))
        rows.append((memory.training(), memory.series("perf/rollout_computed_tokens")))
    assert rows[0] == rows[1]


def test_a_constrained_rule_is_asked_exactly_and_a_free_one_by_sampling() -> None:
    lab = small_lab("env=frozenlake")
    free = small_lab("env=frozenlake", *FREE)
    tables = []
    for one in (lab, free):
        data = one.data
        data.engine.sync(data.policy, 0)
        maker = table_maker(
            policy=data.policy,
            engine=data.engine,
            prompt=data.collector.prompt,
            game=data.collector.example_game,
            sampling=data.sampling,
            completions=3,
            rng=np.random.default_rng(0),
        )
        tables.append(maker([data.collector.example_game.reset(seed=1)[0]]))
    assert [table.exact for table in tables] == [True, False]
