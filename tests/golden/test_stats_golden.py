"""Statistics against numbers worked out by hand; the working stands beside each."""

from __future__ import annotations

import math

import numpy as np
import pytest

from msgrpo_lab.intervals import (
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


@pytest.mark.parametrize(
    ("scores_MR", "expected"),
    [
        # 8 scores, ⌊8/4⌋ = 2 dropped at each end: (3 + 4 + 5 + 6)/4 = 4.5
        ([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 80.0]], 4.5),
        # 10 scores, ⌊10/4⌋ = 2 dropped at each end: (2 + 3 + 4 + 5 + 6 + 7)/6 = 4.5
        ([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]], 4.5),
        # 5 scores, ⌊5/4⌋ = 1 dropped at each end: (2 + 3 + 10)/3 = 5
        ([[10.0, 3.0, 2.0, -7.0, 11.0]], 5.0),
        # 3 scores, none dropped: (1 + 2 + 6)/3 = 3
        ([[6.0], [1.0, 2.0]], 3.0),
    ],
)
def test_iqm_is_the_mean_of_the_middle_half(scores_MR, expected):
    assert iqm([np.array(scores_R) for scores_R in scores_MR]) == pytest.approx(expected, abs=1e-12)


def test_mean_of_means_weighs_tasks_not_runs():
    # task 1: (1 + 1 + 1 + 5)/4 = 2; task 2: 6; (2 + 6)/2 = 4, where the pooled mean would be 14/5
    assert mean_of_means([np.array([1.0, 1.0, 1.0, 5.0]), np.array([6.0])]) == pytest.approx(4.0)


def test_performance_profile_counts_strictly_above():
    # τ=0: 3/4 and 2/2 → 0.875; τ=0.5: 1/4 and 1/2 → 0.375; τ=1: 0
    scores_MR = [np.array([0.0, 0.5, 0.5, 1.0]), np.array([0.2, 0.9])]
    profile_X = performance_profile(scores_MR, np.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(profile_X, [0.875, 0.375, 0.0], atol=1e-12)


def test_probability_of_improvement_counts_ties_half():
    # task 1: pairs (1,0)>, (1,1)=, (3,0)>, (3,1)> → 3.5/4; task 2: (2,5)< → 0; mean 0.4375
    x_MR = [np.array([1.0, 3.0]), np.array([2.0])]
    y_MR = [np.array([0.0, 1.0]), np.array([5.0])]
    assert probability_of_improvement(x_MR, y_MR) == pytest.approx(0.4375)


def test_bootstrap_of_two_runs_has_the_three_possible_means():
    # Runs 0 and 1: resampled means are 0, ½, 1 with probability ¼, ½, ¼, so the 5 % and 95 % quantiles are 0 and 1,
    # and the 30 % and 70 % quantiles (level 0.4) are both ½.
    scores_MR = [np.array([0.0, 1.0])]
    wide = stratified_bootstrap(scores_MR, mean_of_means, np.random.default_rng(0), level=0.9)
    narrow = stratified_bootstrap(scores_MR, mean_of_means, np.random.default_rng(0), level=0.4)
    assert wide == (0.0, 1.0)
    assert narrow == (0.5, 0.5)


def test_bootstrap_is_stratified():
    # Runs within a task are equal, tasks differ: resampling within tasks cannot move the mean, pooling them would.
    scores_MR = [np.array([0.0, 0.0]), np.array([1.0, 1.0])]
    assert stratified_bootstrap(scores_MR, mean_of_means, np.random.default_rng(1)) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("df", "t", "expected"),
    [
        # df 1 is Cauchy: ½ + atan(1)/π = ¾
        (1, 1.0, 0.75),
        # df 2: ½ + t/(2·√(2 + t²)); t = 2: ½ + 1/√6
        (2, 2.0, 0.5 + 1.0 / math.sqrt(6.0)),
        # df 3: ½ + (θ + sinθ·cosθ)/π, θ = atan(√3/√3) = π/4, sinθ·cosθ = ½: ½ + ¼ + 1/(2π)
        (3, math.sqrt(3.0), 0.75 + 1.0 / (2.0 * math.pi)),
        # df 4: ½ + ½·sinθ·(1 + cos²θ/2), θ = atan(2/2) = π/4: ½ + (√2/4)·(5/4)
        (4, 2.0, 0.5 + math.sqrt(2.0) / 4.0 * 1.25),
        # symmetric about 0
        (1, -1.0, 0.25),
        (5, 0.0, 0.5),
    ],
)
def test_student_t_cdf_closed_forms(df, t, expected):
    assert student_t_cdf(t, df) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("df", "expected"),
    # Printed tables of Student's t, two-sided 95 % (e.g. Abramowitz & Stegun 1964, table 26.10)
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_student_t_quantile_matches_the_printed_table(df, expected):
    assert student_t_quantile(0.975, df) == pytest.approx(expected, abs=5.1e-4)
    assert student_t_quantile(0.025, df) == pytest.approx(-expected, abs=5.1e-4)


def test_t_interval_of_three_runs():
    # mean 2, s = 1, t_{0.975, 2} = 4.302653, half-width 4.302653/√3 = 2.484138
    low, high = t_interval(np.array([1.0, 2.0, 3.0]))
    assert low == pytest.approx(2.0 - 2.484138, abs=1e-5)
    assert high == pytest.approx(2.0 + 2.484138, abs=1e-5)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # z = 1.959964, z² = 3.841459. 0 of 10: [0, z²/(10 + z²)] = [0, 0.277533]
        (0, 10, 0.0, 0.277533),
        # 10 of 10: its mirror image, [0.722467, 1]
        (10, 10, 0.722467, 1.0),
        # 5 of 10: ½ ± z/(1 + z²/10)·√(0.025 + z²/400) = ½ ± 1.416000·√0.034604 = ½ ± 0.263405
        (5, 10, 0.236595, 0.763405),
        # 50 of 100: ½ ± 1.959964/1.0384146·√(0.0025 + 3.841459/40000) = ½ ± 1.887459·0.0509526 = ½ ± 0.096171
        (50, 100, 0.403829, 0.596171),
    ],
)
def test_wilson_interval(successes, trials, low, high):
    interval = wilson_interval(successes, trials)
    assert interval.low == pytest.approx(low, abs=2e-5)
    assert interval.high == pytest.approx(high, abs=2e-5)


def test_normalise_puts_random_at_0_and_optimal_at_1():
    # random −0.5, optimal 1.5: 0.5 lies half way, −1 at −0.25
    assert [normalise(score, -0.5, 1.5) for score in (-0.5, 0.5, 1.5, -1.0)] == [0.0, 0.5, 1.0, -0.25]
