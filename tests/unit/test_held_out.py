"""Evaluation on held-out seeds: intervals and scores by hand, and that looking does not change what is looked at."""

from __future__ import annotations

import math
import re
from typing import Any

import lightning as L
import numpy as np
import pytest
from lab_made import fit, rollout, small_lab, turn

from msgrpo_lab.callbacks.evaluation import HeldOutEvaluation
from msgrpo_lab.oracle.players import Score
from msgrpo_lab.rollout.held_out import Outcomes, mean_interval, wilson_interval
from msgrpo_lab.seeding import held_out_seeds
from msgrpo_lab.training.assemble import Lab
from msgrpo_lab.types import RolloutBatch


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),  # z² / (n + z²)
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (1, 2, 0.094531, 0.905469),
        (45, 50, 0.786398, 0.956524),
    ],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize("trials", [1, 7, 400])
def test_wilson_interval_stays_inside_and_holds_the_share(trials: int) -> None:
    for successes in range(trials + 1):
        low, high = wilson_interval(successes, trials)
        assert 0.0 <= low <= high <= 1.0
        assert low <= successes / trials <= high
        assert high - low > 0


def test_interval_of_a_mean() -> None:
    # mean 2, sample variance 1, standard error 1/√3
    half = 1.959963984540054 / math.sqrt(3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half))
    assert mean_interval([4.0, 4.0]) == (4.0, 4.0)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_a_single_value_has_no_interval(values: list[float]) -> None:
    assert all(math.isnan(end) for end in mean_interval(values))


@pytest.fixture
def batch() -> RolloutBatch:
    return rollout(
        (0, True, [turn(reward=9.0, game_reward=1.0)]),
        (1, False, [turn(reward=9.0, game_reward=0.0), turn(action=None, reward=-9.0, game_reward=0.0)]),
        (2, True, [turn(reward=9.0, game_reward=1.0)]),
        (3, True, [turn(reward=9.0, game_reward=1.0)]),
    )


def test_scores_are_of_the_unshaped_return_with_intervals(batch: RolloutBatch) -> None:
    scores = Outcomes.of(batch).scores((0.25, 1.25))
    assert scores["return_mean"] == scores["success_rate"] == 0.75
    low, high = wilson_interval(3, 4)
    assert (scores["success_rate_low"], scores["success_rate_high"]) == (low, high)
    assert (scores["return_mean_low"], scores["return_mean_high"]) == (low, high), "all returns are 0 or 1"
    assert scores["normalised_score"] == pytest.approx(0.5)
    assert scores["normalised_score_low"] == pytest.approx(low - 0.25)
    assert scores["episode_length"] == 1.25
    assert scores["valid_action_rate"] == 0.8


def test_returns_that_are_more_than_success_have_the_normal_interval() -> None:
    outcomes = Outcomes.of(
        rollout(
            *((seed, True, [turn(reward=0.0, game_reward=value)]) for seed, value in enumerate((1.0, 2.0, 2.0, 1.0)))
        )
    )
    scores = outcomes.scores(None)
    half = 1.959963984540054 * (1 / 3) ** 0.5 / 2  # sample variance 1/3, four episodes
    assert (scores["return_mean_low"], scores["return_mean_high"]) == pytest.approx((1.5 - half, 1.5 + half))
    assert scores["success_rate_high"] == 1.0


def test_an_interval_of_episodes_that_all_failed_has_a_width() -> None:
    outcomes = Outcomes.of(rollout(*((seed, False, [turn(reward=0.0, game_reward=0.0)]) for seed in range(4))))
    assert outcomes.scores((0.0, 1.0))["normalised_score_high"] == pytest.approx(wilson_interval(0, 4)[1])


def test_normalisation_takes_the_distance_between_the_players(batch: RolloutBatch) -> None:
    scores = Outcomes.of(batch).scores((-1.0, 2.5))
    assert scores["normalised_score"] == pytest.approx(1.75 / 3.5)
    assert scores["normalised_score_high"] - scores["normalised_score"] == pytest.approx(
        (scores["return_mean_high"] - 0.75) / 3.5
    )


@pytest.mark.parametrize("ends", [None, (1.0, 1.0)])
def test_without_two_ends_there_is_no_normalised_score(batch: RolloutBatch, ends: tuple[float, float] | None) -> None:
    scores = Outcomes.of(batch).scores(ends)
    assert not [name for name in scores if name.startswith("normalised")]
    assert scores["return_mean"] == 0.75


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"episodes": 0}, "evaluation.episodes=0: must be at least 1"),
        ({"every": 0}, "evaluation.every=0: must be at least 1"),
        ({"reference_simulations": -1}, "evaluation.reference_simulations=-1: must be at least 1"),
        ({"temperature": 0.0}, "evaluation.temperature=0.0: must be above 0"),
    ],
)
def test_values_out_of_range_are_told(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(error)}"):
        HeldOutEvaluation(**settings)


def evaluation(**settings: Any) -> HeldOutEvaluation:
    return HeldOutEvaluation(**{"episodes": 12, "scenario": "lake", "reference_simulations": 4, **settings})


def test_evaluation_changes_nothing_of_training() -> None:
    often = fit(small_lab("sampler=abs_adv"), epochs=4, callbacks=[evaluation(every=1)])
    seldom = fit(small_lab("sampler=abs_adv"), epochs=4, callbacks=[evaluation(every=100, episodes=3)])
    never = fit(small_lab("sampler=abs_adv"), epochs=4)
    assert str(often.training()) == str(seldom.training()) == str(never.training())


@pytest.mark.parametrize(
    ("every", "epochs", "updates"), [(1, 3, [0, 1, 2, 3]), (2, 4, [0, 2, 4]), (2, 5, [0, 2, 4, 5]), (9, 2, [0, 2])]
)
def test_start_and_end_are_always_evaluated(every: int, epochs: int, updates: list[int]) -> None:
    memory = fit(small_lab(), epochs=epochs, callbacks=[evaluation(every=every)])
    assert [step for step, row in memory.rows if "eval/lake/return_mean" in row] == updates


def test_metrics_are_named_by_scenario_sampled_and_greedy() -> None:
    memory = fit(small_lab(), epochs=1, callbacks=[evaluation()])
    last = next(row for _, row in reversed(memory.rows) if "eval/lake/return_mean" in row)
    for prefix in ("", "greedy_"):
        for name in ("return_mean", "success_rate", "normalised_score"):
            for suffix in ("", "_low", "_high"):
                assert f"eval/lake/{prefix}{name}{suffix}" in last
    assert memory.series("reference/lake/optimal/success_rate") == [1.0]
    assert len(memory.series("reference/lake/random/return_mean")) == 1
    (random,) = memory.series("reference/lake/random/return_mean")
    expected = (last["eval/lake/return_mean"] - random) / (1.0 - random)
    assert last["eval/lake/normalised_score"] == pytest.approx(expected)


class Watch(L.Callback):
    """Keeps every rollout that is collected."""

    def __init__(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, Any]] = []
        self.rollouts: list[RolloutBatch] = []
        collect = lab.data.collector.collect

        def noted(**arguments: Any) -> RolloutBatch:
            self.asked.append(arguments)
            self.rollouts.append(collect(**arguments))
            return self.rollouts[-1]

        monkeypatch.setattr(lab.data.collector, "collect", noted)


@pytest.mark.parametrize("seed", [0, 7])
def test_every_run_is_evaluated_on_the_same_seeds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = small_lab(f"seed={seed}")
    watch = Watch(lab, monkeypatch)
    fit(lab, epochs=1, callbacks=[evaluation(temperature=0.5)])
    training, sampled, greedy, *_ = watch.asked
    assert sampled["seeds"] == greedy["seeds"] == held_out_seeds(12)
    assert sampled["group_size"] == 1
    assert list(sampled["members"]) == list(greedy["members"]) == [0] * 12, "a seed's chance events are the same too"
    assert (sampled["sampling"].temperature, sampled["sampling"].greedy, greedy["sampling"].greedy) == (
        0.5,
        False,
        True,
    )
    assert (training["sampling"].temperature, training["sampling"].greedy) == (1.0, False)
    assert set(training["seeds"]).isdisjoint(sampled["seeds"])


def test_two_evaluations_of_one_policy_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = small_lab("env=frozenlake_slippery")
    watch = Watch(lab, monkeypatch)
    made = evaluation(every=100)
    fit(lab, epochs=1, callbacks=[made])
    trainer = lab.module.trainer
    first, second = made.evaluate(trainer, lab.data), made.evaluate(trainer, lab.data)
    timeless = [{name: value for name, value in m.items() if not name.startswith("perf/")} for m in (first, second)]
    assert str(timeless[0]) == str(timeless[1])
    paths = [[[t.executed_action for t in e.turns] for e in played.episodes] for played in watch.rollouts[-4:]]
    assert paths[0] == paths[2]
    assert paths[1] == paths[3]


def test_the_untrained_and_the_trained_policy_are_evaluated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = small_lab()
    watch = Watch(lab, monkeypatch)
    fit(lab, epochs=1, callbacks=[evaluation()])
    versions = [{t.completion.policy_version for e in played.episodes for t in e.turns} for played in watch.rollouts]
    assert versions == [{0}, {0}, {0}, {1}, {1}]


def test_latest_return_is_of_the_latest_evaluation() -> None:
    made = evaluation(every=1)
    assert math.isnan(made.latest_return)
    assert made.evaluated_at == -1
    memory = fit(small_lab(), epochs=2, callbacks=[made])
    assert made.latest_return == memory.series("eval/lake/return_mean")[-1]
    assert made.evaluated_at == 2


def test_evaluation_without_the_rollout_data_says_so() -> None:
    class NoData:
        datamodule = None

    with pytest.raises(RuntimeError, match=r"trainer\.fit\(module, datamodule=…\)"):
        evaluation().on_train_epoch_end(
            type("T", (NoData,), {"current_epoch": 0, "max_epochs": 1})(), L.LightningModule()
        )


def test_references_are_computed_once_and_scores_follow_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = evaluation(every=1)
    made.references = {
        name: Score(return_mean=value, success_rate=value, standard_error=0.0, exact=True)
        for name, value in (("random", -1.0), ("optimal", 3.0))
    }
    memory = fit(small_lab(), epochs=1, callbacks=[made])
    assert memory.series("reference/lake/optimal/return_mean") == [3.0]
    raw, score = memory.series("eval/lake/return_mean"), memory.series("eval/lake/normalised_score")
    assert np.allclose(score, (np.array(raw) + 1.0) / 4.0)
