"""Statistics: properties that hold for any scores, and refusals."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msgrpo_lab.intervals import (
    NO_INTERVAL,
    iqm,
    mean_of_means,
    normalise,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
    student_t_cdf,
    student_t_quantile,
    t_interval,
    wilson_interval,
)

FINITE = st.floats(-100, 100, allow_nan=False)
RUNS = st.lists(FINITE, min_size=1, max_size=12).map(np.array)
TASKS = st.lists(RUNS, min_size=1, max_size=4)
SEVERAL = st.lists(st.lists(FINITE, min_size=2, max_size=8).map(np.array), min_size=1, max_size=3)


@given(TASKS)
def test_iqm_lies_between_the_quartiles_extremes(scores_MR):
    pooled_N = np.sort(np.concatenate(scores_MR))
    cut = pooled_N.size // 4
    assert pooled_N[cut] - 1e-9 <= iqm(scores_MR) <= pooled_N[pooled_N.size - 1 - cut] + 1e-9


@given(TASKS, FINITE)
def test_iqm_moves_with_the_scores(scores_MR, shift):
    assert iqm([scores_R + shift for scores_R in scores_MR]) == pytest.approx(iqm(scores_MR) + shift, abs=1e-8)


def test_iqm_ignores_one_outlier_that_moves_the_mean():
    scores_R = np.array([0.4, 0.5, 0.6, 0.5])
    wild_R = np.array([0.4, 0.5, 0.6, 500.0])
    assert iqm([wild_R]) == pytest.approx(0.55)
    assert wild_R.mean() > 100 * scores_R.mean()


@given(TASKS)
def test_profile_falls_from_one_to_zero(scores_MR):
    thresholds_X = np.linspace(-101, 101, 23)
    profile_X = performance_profile(scores_MR, thresholds_X)
    assert profile_X[0] == 1.0
    assert profile_X[-1] == 0.0
    assert (np.diff(profile_X) <= 1e-12).all()


@given(TASKS, st.randoms(use_true_random=False))
def test_improvement_one_way_and_the_other_add_to_one(x_MR, random):
    y_MR = [np.array([random.uniform(-100, 100) for _ in range(3)]) for _ in x_MR]
    there, back = probability_of_improvement(x_MR, y_MR), probability_of_improvement(y_MR, x_MR)
    assert there + back == pytest.approx(1.0)
    assert probability_of_improvement(x_MR, x_MR) == pytest.approx(0.5)


@settings(max_examples=25, deadline=None)
@given(SEVERAL, st.integers(0, 2**32 - 1))
def test_bootstrap_stays_within_the_scores_and_repeats_with_its_seed(scores_MR, seed):
    first, again = (
        stratified_bootstrap(scores_MR, mean_of_means, np.random.default_rng(seed), num_resamples=50) for _ in range(2)
    )
    assert first == again
    pooled_N = np.concatenate(scores_MR)
    assert pooled_N.min() - 1e-9 <= first.low <= first.high <= pooled_N.max() + 1e-9


@settings(max_examples=25, deadline=None)
@given(SEVERAL, st.floats(0.05, 0.9), st.floats(0.01, 0.09))
def test_bootstrap_widens_with_the_level(scores_MR, level, more):
    narrow, wide = (
        stratified_bootstrap(scores_MR, iqm, np.random.default_rng(3), level=value, num_resamples=60)
        for value in (level, level + more)
    )
    assert wide.low <= narrow.low
    assert narrow.high <= wide.high


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(20)
    covered = 0
    for _ in range(150):
        scores_R = rng.normal(0.3, 1.0, 25)
        low, high = stratified_bootstrap([scores_R], mean_of_means, rng, level=0.9, num_resamples=300)
        covered += low <= 0.3 <= high
    assert 0.80 <= covered / 150 <= 0.97  # 0.9 up to the narrowness at R = 25 and three binomial deviations


def test_t_interval_covers_with_three_runs():
    rng = np.random.default_rng(21)
    covered = sum(low <= 0.3 <= high for low, high in (t_interval(rng.normal(0.3, 1.0, 3)) for _ in range(600)))
    assert 0.92 <= covered / 600 <= 0.98


@pytest.mark.parametrize("scores_MR", [[[0.5]], [[0.1, 0.9], [0.5]]])
def test_a_single_run_has_no_interval(scores_MR):
    interval = stratified_bootstrap([np.array(x) for x in scores_MR], iqm, np.random.default_rng(0))
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_a_single_run_has_no_t_interval():
    assert t_interval(np.array([0.5])) is NO_INTERVAL


@given(st.integers(1, 400), st.data())
def test_wilson_contains_the_share_and_mirrors(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson_interval(successes, trials)
    mirror = wilson_interval(trials - successes, trials)
    assert 0.0 <= low <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= high <= 1.0
    assert (low, high) == pytest.approx((1 - mirror.high, 1 - mirror.low), abs=1e-9)
    assert high - low > 0


@pytest.mark.parametrize("trials", [10, 100, 1000])
def test_wilson_narrows_with_more_episodes(trials):
    few, many = wilson_interval(trials // 2, trials), wilson_interval(5 * trials, 10 * trials)
    assert many.high - many.low < 0.5 * (few.high - few.low)


@given(st.integers(1, 60), st.floats(0.001, 0.999))
def test_t_quantile_inverts_the_cdf(df, probability):
    assert student_t_cdf(student_t_quantile(probability, df), df) == pytest.approx(probability, abs=1e-9)


def test_t_approaches_the_normal():
    assert student_t_quantile(0.975, 5000) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: iqm([]), "scores_MR is empty"),
        (lambda: iqm([np.array([])]), r"scores_MR\[0\] has shape"),
        (lambda: iqm([np.zeros((2, 2))]), r"shape \(2, 2\)"),
        (lambda: probability_of_improvement([np.ones(2)], [np.ones(2), np.ones(2)]), "same tasks"),
        (lambda: stratified_bootstrap([np.ones(2)], iqm, np.random.default_rng(0), level=95), "level=95"),
        (lambda: stratified_bootstrap([np.ones(2)], iqm, np.random.default_rng(0), num_resamples=0), "at least 1"),
        (lambda: wilson_interval(5, 4), "successes=5, trials=4"),
        (lambda: wilson_interval(0, 0), "trials ≥ 1"),
        (lambda: student_t_cdf(1.0, 0), "df=0"),
        (lambda: student_t_quantile(1.0, 3), "level=1.0"),
        (lambda: t_interval(np.ones(3), level=1.5), "level=1.5"),
        (lambda: normalise(0.5, 1.0, 1.0), "no scale"),
    ],
)
def test_nonsense_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
