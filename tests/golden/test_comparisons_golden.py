"""Comparisons of few runs against numbers worked out by hand; the working stands beside each."""

from __future__ import annotations

import math

import numpy as np
import pytest

from msgrpo_lab.report.comparisons import improvement_interval, profile_band, sign_test


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        # 5 of 5 positive: 2 · (½)⁵ = 0.0625
        ([0.1, 0.2, 0.3, 0.4, 0.5], 0.0625),
        # 4 of 5: 2 · (1 + 5)/32 = 0.375
        ([0.1, 0.2, 0.3, 0.4, -0.5], 0.375),
        # 1 of 8, the other way round: 2 · (1 + 8)/256 = 0.0703125
        ([-1.0] * 7 + [1.0], 0.0703125),
        # 2 of 4: 2 · (1 + 4 + 6)/16 = 1.375, which is cut at 1
        ([1.0, 1.0, -1.0, -1.0], 1.0),
        # zeros are dropped: 3 of 3, 2/8
        ([0.0, 1.0, 0.0, 2.0, 3.0], 0.25),
        # nothing left: no evidence
        ([0.0, 0.0], 1.0),
    ],
)
def test_sign_test_is_the_exact_binomial(differences, expected):
    assert sign_test(np.array(differences)) == pytest.approx(expected, abs=1e-12)


def test_sign_test_refuses_what_has_no_sign():
    with pytest.raises(ValueError, match="not finite"):
        sign_test(np.array([1.0, math.nan]))


def test_improvement_interval_of_one_free_choice():
    # y is ½ whatever is drawn; of x = (0, 1) a resample has 0, 1 or 2 wins of 2 with probability ¼, ½, ¼:
    # the 5 % and 95 % quantiles are 0 and 1, the 30 % and 70 % ones ½.
    x_MR, y_MR = [np.array([0.0, 1.0])], [np.array([0.5, 0.5])]
    assert improvement_interval(x_MR, y_MR, np.random.default_rng(0), level=0.9) == (0.0, 1.0)
    assert improvement_interval(x_MR, y_MR, np.random.default_rng(0), level=0.4) == (0.5, 0.5)


def test_improvement_interval_counts_ties_half_and_tasks_alike():
    # task 1: always equal, ½; task 2: always above, 1; their mean is ¾ in every resample
    x_MR = [np.array([1.0, 1.0]), np.array([5.0, 6.0, 7.0])]
    y_MR = [np.array([1.0, 1.0, 1.0]), np.array([0.0, 1.0])]
    assert improvement_interval(x_MR, y_MR, np.random.default_rng(0)) == (0.75, 0.75)


def test_improvement_interval_does_not_exist_for_a_single_run():
    low, high = improvement_interval([np.array([1.0])], [np.array([0.0, 0.5])], np.random.default_rng(0))
    assert math.isnan(low)
    assert math.isnan(high)


def test_improvement_interval_refuses_different_tasks():
    with pytest.raises(ValueError, match="compare on the same tasks"):
        improvement_interval([np.ones(2)], [np.ones(2), np.ones(2)], np.random.default_rng(0))


def test_profile_band_of_two_runs():
    # runs 0 and 1. Above τ = −1: both, always 1. Above ½: 0, ½ or 1 with probability ¼, ½, ¼. Above 1: none.
    scores_MR, threshold_X = [np.array([0.0, 1.0])], np.array([-1.0, 0.5, 1.0])
    low_X, high_X = profile_band(scores_MR, threshold_X, np.random.default_rng(0), level=0.9)
    np.testing.assert_array_equal(low_X, [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(high_X, [1.0, 1.0, 0.0])


def test_profile_band_resamples_within_tasks():
    # runs of a task are equal: resampling within tasks cannot move the share above ½ from ½, pooling them would
    low_X, high_X = profile_band([np.zeros(3), np.ones(3)], np.array([0.5]), np.random.default_rng(0))
    assert (low_X[0], high_X[0]) == (0.5, 0.5)


def test_profile_band_does_not_exist_for_a_single_run():
    scores_MR = [np.array([0.3]), np.array([0.3, 0.4])]
    low_X, high_X = profile_band(scores_MR, np.array([0.0, 1.0]), np.random.default_rng(0))
    assert np.isnan(low_X).all()
    assert np.isnan(high_X).all()
