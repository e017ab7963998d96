"""Paired comparisons, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from msgrpo_lab.evaluation.pairs import compare_returns


def test_a_pair_by_hand() -> None:
    """Differences 1, 1, −1, 0, 1, 0: mean 1/3, sample variance 2/3, t quantile of 5 degrees 2.5705818."""
    ours = np.array([2.0, 1.0, 0.0, 3.0, 1.0, 0.5])
    theirs = np.array([1.0, 0.0, 1.0, 3.0, 0.0, 0.5])
    pair = compare_returns(ours, theirs)
    half = 2.5705818356363 * math.sqrt((2 / 3) / 6)
    assert pair.difference == pytest.approx(1 / 3)
    assert (pair.difference_low, pair.difference_high) == pytest.approx((1 / 3 - half, 1 / 3 + half))
    assert (pair.wins, pair.ties, pair.losses) == (3, 2, 1)
    assert pair.probability_of_improvement == pytest.approx(4 / 6)
    # 1, 1, 0, ½, 1, ½: sample variance 1/6
    half = 2.5705818356363 * math.sqrt((1 / 6) / 6)
    assert pair.probability_of_improvement_low == pytest.approx(4 / 6 - half)
    assert pair.probability_of_improvement_high == 1.0
    assert pair.sign_test_p == pytest.approx(2 * (1 + 4) / 16)  # at least 3 of 4, either way


def test_the_other_way_round_is_the_mirror_image() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 3, size=(2, 40)).astype(float)
    pair, mirror = compare_returns(ours, theirs), compare_returns(theirs, ours)
    assert mirror.difference == pytest.approx(-pair.difference)
    assert mirror.difference_low == pytest.approx(-pair.difference_high)
    assert mirror.probability_of_improvement == pytest.approx(1 - pair.probability_of_improvement)
    assert (mirror.wins, mirror.losses) == (pair.losses, pair.wins)
    assert mirror.sign_test_p == pytest.approx(pair.sign_test_p)


def test_what_both_share_cancels() -> None:
    """Episodes differ by hundreds, the policies by exactly one: unpaired, nothing could be told."""
    shared = np.linspace(-500, 500, 20)
    pair = compare_returns(shared + 1, shared)
    assert pair.difference == pytest.approx(1)
    assert pair.difference_low == pytest.approx(1)
    assert pair.sign_test_p == pytest.approx(2 * 0.5**20)


def test_equal_policies_do_not_differ() -> None:
    pair = compare_returns(np.ones(7), np.ones(7))
    assert (pair.difference, pair.difference_low, pair.difference_high) == (0, 0, 0)
    assert (pair.probability_of_improvement, pair.sign_test_p, pair.ties) == (0.5, 1.0, 7)


def test_a_single_episode_has_no_interval() -> None:
    pair = compare_returns(np.array([1.0]), np.array([0.0]))
    assert pair.difference == 1
    assert math.isnan(pair.difference_low)
    assert math.isnan(pair.probability_of_improvement_high)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [1.0, 2.0]), ([], [])])
def test_other_episodes_are_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="both must be of the same episodes"):
        compare_returns(np.array(ours), np.array(theirs))
