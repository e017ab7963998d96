"""The meter on real games: exact credit has 1, random credit 0, and a fault injected into a rule is seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fidelity_made import Played, credit_of, play, scores_of

from msgrpo_lab.credit.base import rewards_of
from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.credit.exact import Exact
from msgrpo_lab.credit.reward_to_go import RewardToGo, reward_to_go
from msgrpo_lab.fidelity.gradients import episode_gradients, group_sums, map_gradients, score_matrix
from msgrpo_lab.fidelity.meter import CREDIT_SCORES, DRAWN_SCORES, draw_repeatedly, measure
from msgrpo_lab.fidelity.statistics import resample_groups
from msgrpo_lab.oracle.lake_values import exact_gradient, induced_gradient
from msgrpo_lab.sampler.abs_advantage import AbsAdvantage
from msgrpo_lab.sampler.base import with_outcomes
from msgrpo_lab.sampler.positive_only import PositiveOnly
from msgrpo_lab.sampler.uniform import Uniform
from msgrpo_lab.types import Selection


@pytest.fixture(scope="module", params=[False, True], ids=["firm", "slippery"])
def played(request: pytest.FixtureRequest) -> Played:
    return play(slippery=request.param, groups=60)


@pytest.fixture(scope="module", params=[False, True], ids=["firm", "slippery"])
def talkative(request: pytest.FixtureRequest) -> Played:
    """Without ⊥, whose penalty would drown what else tells good turns from bad ones."""
    return play(slippery=request.param, groups=60, skill=0.4, silence=0.0)


def test_gradients_of_groups_add_up_to_the_oracles(played):
    batch, truth = played.batch, played.truth
    turns = truth.turns(batch)
    adv_ET = np.random.default_rng(0).normal(size=turns.taken.shape)
    score = score_matrix(turns.text[turns.taken], turns.answer[turns.taken], truth.table.prob_XB)
    of_episodes = episode_gradients(adv_ET[turns.taken], batch.num_turns, score)
    expected = induced_gradient(adv_ET, turns.taken, turns.text, turns.answer, truth.table.prob_XB)
    of_groups = group_sums(of_episodes, batch.group_index, np.ones(480), 60)
    np.testing.assert_allclose(of_groups.sum(axis=0) / 480, expected.ravel(), atol=1e-12)
    third = group_sums(of_episodes, batch.group_index, (batch.group_index == 3) * 2.0, 60).toarray()
    assert not np.delete(third, 3, axis=0).any()
    np.testing.assert_allclose(third[3], 2 * of_groups.toarray()[3], atol=1e-12)
    weight_M = np.random.default_rng(1).dirichlet(np.ones(len(truth.values.value_MTS)))
    np.testing.assert_allclose(
        weight_M @ map_gradients(truth.values, truth.texts),
        exact_gradient(truth.values, truth.texts, weight_M).ravel(),
        atol=1e-12,
    )


def test_the_yardstick_holds_the_rollouts_exact_gradient(played):
    yardstick = played.yardstick
    np.testing.assert_allclose(
        yardstick.exact_GL.sum(axis=0) / 480, played.truth.gradient(played.batch).ravel(), atol=1e-12
    )
    unfilled = played._replace(batch=replace(played.batch, exact_adv=None))
    np.testing.assert_array_equal(unfilled.yardstick.exact_ET, yardstick.exact_ET)


def test_exact_credit_scores_one_everywhere(played):
    for rule in (Exact(), Exact(normalise="batch")):
        (scores,) = scores_of(played, rule(played.batch))
        assert list(scores) == list(CREDIT_SCORES)
        for name in ("spearman", "pearson", "sign_agreement", "sampled_cosine"):
            assert tuple(scores[name].estimate()) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6), name
        for name in ("wrong_sign", "bias"):
            assert tuple(scores[name].estimate()) == pytest.approx((0.0, 0.0, 0.0), abs=1e-6), name
        assert scores["gradient_cosine"].estimate().low > 0.85, "chance alone is between it and the exact gradient"


def test_exact_credit_scores_one_under_every_sampler(played):
    credit = with_outcomes(played.batch, Exact()(played.batch))
    times = resample_groups(60, 40, np.random.default_rng(0))
    for sampler in (Uniform(num_episodes=200), AbsAdvantage(num_episodes=200, importance_weights=True)):
        draws = draw_repeatedly(sampler, credit, played.batch, 200, np.random.default_rng(1).spawn(4))
        scores = measure(played.yardstick, credit, times, draws=draws)
        assert list(scores) == [*CREDIT_SCORES, *DRAWN_SCORES]
        for name in ("spearman", "pearson", "sign_agreement", "sampled_cosine"):
            assert tuple(scores[name].estimate()) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6), name


def test_random_credit_scores_zero_within_its_error(played):
    """Over 40 random credits every mean is 0 within 4 errors, and the intervals hold 0 about as often as they say."""
    rng = np.random.default_rng(0)
    shape = played.yardstick.exact_ET.shape
    runs = scores_of(played, *(credit_of(played, rng.normal(size=shape)) for _ in range(40)))
    centre = {"spearman": 0.0, "pearson": 0.0, "sign_agreement": 0.0, "wrong_sign": 0.5}
    centre |= {"gradient_cosine": 0.0, "sampled_cosine": 0.0}
    for name, middle in centre.items():
        values = np.array([scores[name].estimate().value for scores in runs]) - middle
        assert abs(values.mean()) < 4 * values.std(ddof=1) / np.sqrt(40), name
        ends = np.array([scores[name].estimate() for scores in runs])
        held = np.mean((ends[:, 1] <= middle) & (middle <= ends[:, 2]))
        # A gradient of nothing but noise has few directions to point in: its cosine is far from normal.
        assert held > (0.7 if "cosine" in name else 0.85), name


def test_reversed_credit_scores_minus_one(played):
    (scores,) = scores_of(played, credit_of(played, -played.yardstick.exact_ET))
    for name in ("spearman", "pearson", "sign_agreement", "sampled_cosine"):
        assert scores[name].estimate().value == pytest.approx(-1.0)
    assert scores["wrong_sign"].estimate().value == 1.0


# Faults -------------------------------------------------------------------------------------------------------------


def averaged_over_steps(played):
    """MS-GRPO's advantage with mean and std over the group's rows, one a turn, as a slip in a batch layout makes it."""
    rewards = rewards_of(played.batch)
    return_ET = np.broadcast_to(rewards.reward.sum(axis=1)[:, None], rewards.mask.shape)
    adv_ET = np.zeros(rewards.mask.shape)
    for group in np.unique(played.batch.group_index):
        rows = rewards.mask & (played.batch.group_index == group)[:, None]
        adv_ET[rows] = (return_ET[rows] - return_ET[rows].mean()) / (return_ET[rows].std() + 1e-6)
    return credit_of(played, adv_ET)


def one_turn_late(played):
    """Reward-to-go from the *next* turn on, G_{t+1}: a turn is not credited with its own reward."""
    reward_ET = rewards_of(played.batch).reward
    later = []
    for episode, row in zip(played.batch.episodes, np.pad(reward_ET[:, 1:], ((0, 0), (0, 1))).tolist(), strict=True):
        turns = (replace(turn, reward=reward) for turn, reward in zip(episode.turns, row, strict=False))
        later.append(replace(episode, turns=tuple(turns)))
    return RewardToGo(baseline="turn")(replace(played.batch, episodes=tuple(later)))


def test_an_advantage_averaged_over_steps_is_seen(talkative):
    """Long episodes, the failed ones here, pull the mean down that all are compared with: turns are paid less."""
    played = talkative
    right, wrong = scores_of(played, EpisodeReturn()(played.batch), averaged_over_steps(played))
    change = wrong["bias"].minus(right["bias"])
    assert change.estimate().is_below_zero
    assert change.estimate().value < min(-0.03, -2.5 * change.standard_error)
    np.testing.assert_allclose(
        averaged_over_steps(played).turn_adv,
        EpisodeReturn(baseline_weighting="step")(played.batch).turn_adv,
        atol=1e-9,
        err_msg="the injected fault is not the one it is said to be",
    )


def test_a_reward_to_go_that_is_off_by_one_is_seen(talkative):
    played = talkative
    right, wrong = scores_of(played, RewardToGo(baseline="turn")(played.batch), one_turn_late(played))
    for name in ("pearson", "spearman", "sign_agreement", "sampled_cosine", "gradient_cosine"):
        assert wrong[name].minus(right[name]).estimate().is_below_zero, name
    reward_ET = rewards_of(played.batch).reward
    np.testing.assert_allclose(
        reward_to_go(np.pad(reward_ET[:, 1:], ((0, 0), (0, 1))), 1.0)[:, :-1],
        reward_to_go(reward_ET, 1.0)[:, 1:],
        atol=1e-12,
        err_msg="the injected fault is not the one it is said to be",
    )


# Under samplers -----------------------------------------------------------------------------------------------------


def test_drawing_all_episodes_is_the_pool(played):
    credit = with_outcomes(played.batch, EpisodeReturn()(played.batch))
    times = resample_groups(60, 20, np.random.default_rng(0))
    draws = draw_repeatedly(Uniform(num_episodes=480), credit, played.batch, 480, np.random.default_rng(1).spawn(2))
    pool = measure(played.yardstick, credit, times)
    drawn = measure(played.yardstick, credit, times, draws=draws)
    for name in CREDIT_SCORES:
        np.testing.assert_allclose(drawn[name].point_D, np.repeat(pool[name].point_D, 2), atol=1e-9, err_msg=name)
        np.testing.assert_allclose(drawn[name].resampled_DR.ravel(), pool[name].resampled_DR.ravel(), atol=1e-9)
    for name, expected in {"pool_cosine": 1.0, "norm_ratio": 1.0, "ess": 1.0, "inclusion_bias": 0.0}.items():
        assert drawn[name].estimate().value == pytest.approx(expected, abs=1e-9)


def test_a_sampler_that_takes_the_good_alone_is_told_from_a_fair_one(played):
    credit = with_outcomes(played.batch, EpisodeReturn()(played.batch))
    times = resample_groups(60, 80, np.random.default_rng(0))
    rngs = lambda: np.random.default_rng(1).spawn(4)  # noqa: E731
    fair, greedy = (
        measure(played.yardstick, credit, times, draws=draw_repeatedly(sampler, credit, played.batch, 120, rngs()))
        for sampler in (Uniform(num_episodes=120), PositiveOnly(num_episodes=120))
    )
    assert greedy["mean_advantage"].minus(fair["mean_advantage"]).estimate().is_above_zero
    assert greedy["ess"].estimate().value < 0.7 < fair["ess"].estimate().value


def test_a_draw_counts_as_often_as_drawn_and_with_its_weights(played):
    """Episode 5 twice, of weights 1 and 0.5, and episode 9 once, of weight 2: 1.5 and 2, and all others nothing."""
    credit = with_outcomes(played.batch, EpisodeReturn()(played.batch))
    uniform_E = np.full(480, 1 / 480)
    drawn = Selection(
        index=np.array([5, 9, 5]), prob=uniform_E, weight=np.array([1.0, 2.0, 0.5]), inclusion=3 * uniform_E
    )
    times = resample_groups(60, 4, np.random.default_rng(0))
    scores = measure(played.yardstick, credit, times, draws=[drawn])
    weight_E = np.zeros(480)
    weight_E[[5, 9]] = 1.5, 2.0
    taken = credit.turn_mask
    weight_N = np.broadcast_to(weight_E[:, None], taken.shape)[taken]
    estimate_N, exact_N = credit.turn_adv[taken], played.yardstick.exact_ET[taken]
    ((xx, xy), (_, yy)) = np.cov(estimate_N, exact_N, aweights=weight_N)
    assert scores["pearson"].point_D[0] == pytest.approx(xy / np.sqrt(xx * yy), abs=1e-8)
    gradient = weight_E @ episode_gradients(estimate_N, played.batch.num_turns, played.yardstick.score_NL)
    exact = played.truth.gradient(played.batch).ravel()
    expected = gradient @ exact / np.linalg.norm(gradient) / np.linalg.norm(exact)
    assert scores["gradient_cosine"].point_D[0] == pytest.approx(expected, abs=1e-9)


def test_weights_undo_the_sampling_in_the_mean():
    """Over many draws the weighted gradient is the pool's; without weights, AAW's is twice as long and more."""
    played = play(groups=20)
    credit = with_outcomes(played.batch, EpisodeReturn()(played.batch))
    gradient = episode_gradients(
        credit.turn_adv[credit.turn_mask], played.batch.num_turns, played.yardstick.score_NL
    ).toarray()
    drawn = {}
    for weighted in (False, True):
        sampler = AbsAdvantage(num_episodes=40, floor=0.05, importance_weights=weighted)
        draws = draw_repeatedly(sampler, credit, played.batch, 40, np.random.default_rng(1).spawn(400))
        drawn[weighted] = np.mean([pick.weight @ gradient[pick.index] / 40 for pick in draws], axis=0)
    pool = gradient.mean(axis=0)
    assert np.linalg.norm(drawn[True] - pool) < 0.15 * np.linalg.norm(pool)
    assert np.linalg.norm(drawn[False]) > 1.4 * np.linalg.norm(pool)


def test_sequence_reduction_weighs_each_turn_by_its_episodes_length(played):
    credit = EpisodeReturn()(played.batch)
    times = resample_groups(60, 4, np.random.default_rng(0))
    length_E = played.batch.num_turns[:, None]
    by_sequence = measure(played.yardstick, credit, times, reduction="sequence")["gradient_cosine"]
    by_hand = measure(played.yardstick, credit_of(played, credit.turn_adv / length_E), times)["gradient_cosine"]
    np.testing.assert_allclose(by_sequence.point_D, by_hand.point_D, atol=1e-12)
    assert by_sequence.point_D != measure(played.yardstick, credit, times)["gradient_cosine"].point_D


def test_other_credit_is_refused(played):
    yardstick = played.yardstick
    times = resample_groups(60, 4, np.random.default_rng(0))
    credit = EpisodeReturn()(played.batch)
    with pytest.raises(ValueError, match="give the credit of the rollout that the yardstick is of"):
        measure(yardstick, replace(credit, turn_adv=credit.turn_adv[:-1], turn_mask=credit.turn_mask[:-1]), times)
    with pytest.raises(ValueError, match=r"Credit\.turn_adv is not finite"):
        measure(yardstick, replace(credit, turn_adv=credit.turn_adv * np.nan), times)
