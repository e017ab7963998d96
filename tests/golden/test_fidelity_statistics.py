"""Agreement of two advantages a turn: by hand, against scipy, and on resamples against the repeated data themselves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from msgrpo_lab.fidelity.gradients import cosine
from msgrpo_lab.fidelity.meter import relative_variance
from msgrpo_lab.fidelity.statistics import (
    DAMPING,
    Estimate,
    Score,
    agreement,
    midranks,
    rank_correlation,
    resample_groups,
)


def alone(estimate, exact, weight=None):
    """Agreement of one batch of a single group."""
    estimate, exact = np.array(estimate, dtype=float), np.array(exact, dtype=float)
    weight = np.ones_like(estimate) if weight is None else np.array(weight, dtype=float)
    found = agreement(estimate, exact, weight, np.zeros(len(exact), dtype=int), np.ones((1, 1)))
    return {name: float(value[0]) for name, value in found._asdict().items()}


def test_by_hand():
    """Â = (2, −1, 0, 1), A = (4, 2, −1, −1).

    Signs: right, wrong, none, wrong: (1 − 1 + 0 − 1)/4 and 2/4. Pearson: means ½ and 1, products 4.5 − 1.5 + 1 − 1 = 3
    of √(5 · 18). Ranks (4, 1, 2, 3) and (4, 3, 1.5, 1.5): means 2.5, products 2.25 − 0.75 + 0.5 − 0.5 = 1.5 of
    √(5 · 4.5). Bias: ½ of √(6/4) less 1 of √(22/4).
    """
    found = alone([2, -1, 0, 1], [4, 2, -1, -1])
    assert found["sign_agreement"] == pytest.approx(-0.25)
    assert found["wrong_sign"] == pytest.approx(0.5)
    assert found["pearson"] == pytest.approx(3 / np.sqrt(90))
    assert found["spearman"] == pytest.approx(1.5 / np.sqrt(22.5))
    assert found["bias"] == pytest.approx(0.5 / np.sqrt(1.5) - 1 / np.sqrt(5.5))


def test_turns_of_no_exact_advantage_have_no_right_sign():
    """Three of five turns have one: one right, one wrong, one without credit."""
    found = alone([1, 1, 0, 1, -2], [3, -3, 3, 0, 0])
    assert found["sign_agreement"] == 0.0
    assert found["wrong_sign"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_units_do_not_matter_and_rounding_has_no_sign(scale):
    exact = np.array([0.5, -0.25, 0.0, 0.125])
    found = alone(scale * (exact + np.array([0, 0, 1e-13, 0])), exact)
    expected = {"spearman": 1.0, "pearson": 1.0, "sign_agreement": 1.0, "wrong_sign": 0.0, "bias": 0.0}
    assert found == pytest.approx(expected, abs=1e-8)
    assert alone(-scale * exact, exact)["wrong_sign"] == 1.0


def test_what_differs_by_rounding_is_tied():
    """Three turns of the same credit, worked out in three orders of summation, share their rank."""
    exact = [4.0, -1.0, 2.0, 0.0]
    assert alone([0.3, 0.1 + 0.2, 0.3 - 1e-15, -1.0], exact) == alone([0.3, 0.3, 0.3, -1.0], exact)
    assert alone(exact, [0.3, 0.1 + 0.2, 0.3 - 1e-15, 0.0]) == alone(exact, [0.3, 0.3, 0.3, 0.0])


def test_what_does_not_vary_has_no_correlation():
    found = alone([0, 0, 0], [1, 2, -3])
    assert np.isnan(found["spearman"])
    assert np.isnan(found["pearson"])
    assert (found["sign_agreement"], found["wrong_sign"]) == (0.0, 0.0)
    assert np.isnan(alone([2, 2, 2], [1, 2, -3])["pearson"])
    assert np.isnan(alone([1, 2], [0, 0])["sign_agreement"]), "no turn has a right sign"


@pytest.mark.parametrize("distinct", [3, 10_000])
def test_correlations_are_scipys(distinct):
    rng = np.random.default_rng(0)
    x = rng.integers(distinct, size=500).astype(float)
    y = np.round(x / distinct + rng.normal(size=500), 1)
    found = alone(x, y)
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
    assert found["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)


def some_turns(seed=0, turns=300, groups=6):
    rng = np.random.default_rng(seed)
    group = np.sort(rng.integers(groups, size=turns))
    exact = np.round(rng.normal(size=turns), 1)
    return np.round(exact + rng.normal(size=turns), 1), exact, group, rng


def test_a_resample_is_the_repeated_data():
    """Multiplicities give to the bit of rounding what the groups' turns, written down so often, give."""
    estimate, exact, group, rng = some_turns()
    times = np.concatenate([np.ones((1, 6)), rng.multinomial(6, np.full(6, 1 / 6), size=5)])
    found = agreement(estimate, exact, np.ones(300), group, times)
    # One scale for all resamples, so that the rounding is the same.
    for row, counts in enumerate(times):
        index = np.concatenate([np.tile(np.flatnonzero(group == g), int(n)) for g, n in enumerate(counts)])
        assert found.spearman[row] == pytest.approx(stats.spearmanr(estimate[index], exact[index]).statistic, abs=1e-9)
        assert found.pearson[row] == pytest.approx(stats.pearsonr(estimate[index], exact[index]).statistic, abs=1e-8)
        sign = np.sign(estimate[index]) * np.sign(exact[index])
        assert found.sign_agreement[row] == pytest.approx(sign[exact[index] != 0].mean())
        assert found.wrong_sign[row] == pytest.approx((sign < 0)[exact[index] != 0].mean())
        rms = [np.sqrt(np.mean(values[index] ** 2)) for values in (estimate, exact)]
        expected = estimate[index].mean() / rms[0] - exact[index].mean() / rms[1]
        assert found.bias[row] == pytest.approx(expected, abs=1e-8)


def test_a_weight_is_a_multiplicity():
    estimate, exact, group, rng = some_turns(1)
    weight = rng.integers(0, 4, size=300)
    index = np.repeat(np.arange(300), weight)
    times = np.ones((1, 6))
    weighted = agreement(estimate, exact, weight.astype(float), group, times)
    repeated = agreement(estimate[index], exact[index], np.ones(len(index)), group[index], times)
    for one, other in zip(weighted, repeated, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-8)


def test_midranks_by_hand():
    """Values 5, 7, 7, 9 with group 0 twice and group 1 never: 5 and 7 of weight 2 each."""
    rank_VR, of_N = midranks(
        np.array([5.0, 7.0, 7.0, 9.0]), np.ones(4), np.array([0, 0, 1, 1]), np.array([[1.0, 1.0], [2.0, 0.0]])
    )
    np.testing.assert_allclose(rank_VR[of_N].T, [[0.5, 2.0, 2.0, 3.5], [1.0, 3.0, 3.0, 4.0]])


def test_ranks_of_one_value_have_no_correlation():
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0), np.ones(4), np.zeros(4, int), np.ones((1, 1))))


def test_cosine_by_hand():
    first, second = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0]]), np.array([[4.0, 3.0], [1.0, 0.0], [-2.0, -2.0]])
    np.testing.assert_allclose(cosine(first, second), [0.96, np.nan, -1.0])


def test_relative_variance_by_hand_and_by_resampling_without_end():
    """Groups (1, 0), (3, 0), (2, 3): mean (2, 1), squares 1, 9, 13. (23/3 − 5)/2/5; resampling has ⅔ of it."""
    gradient = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
    once = np.ones((1, 3))
    (found,) = relative_variance(sparse.csr_array(gradient), once @ gradient, once)
    assert found == pytest.approx((23 / 3 - 5) / 2 / 5)
    means = np.random.default_rng(0).multinomial(3, np.full(3, 1 / 3), size=200_000) @ gradient / 3
    resampled = np.square(means - gradient.mean(axis=0)).sum(axis=1).mean() / 5
    assert resampled == pytest.approx(found * 2 / 3, rel=0.01)


# Estimates ----------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_of_groups():
    """For a mean it is the textbook one, and it covers the truth as often as it says."""
    rng, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(300):
        values = rng.normal(size=40)
        times = resample_groups(40, 200, rng)
        value, low, high = Score(point_D=values.mean()[None], resampled_DR=(times @ values)[None] / 40).estimate()
        assert value == values.mean()
        widths.append((high - low) / (2 * 1.96 / np.sqrt(40)))
        covered += low <= 0 <= high
    assert 0.90 < covered / 300 < 0.98
    assert np.mean(widths) == pytest.approx(1.0, abs=0.05)


def test_draws_add_their_own_error():
    """Resamples of spread 3 in two draws that differ by 2: √(9 + 2/2)."""
    spread = 3 * DAMPING * np.array([1.0, -1.0]) / np.sqrt(2)
    score = Score(point_D=np.array([4.0, 6.0]), resampled_DR=np.stack([4 + spread, 6 + spread]))
    assert score.standard_error == pytest.approx(np.sqrt(10))
    assert score.estimate().value == 5.0
    settled = Score(point_D=np.array([1.0, 1.0]), resampled_DR=np.empty((2, 0)))
    assert settled.estimate() == Estimate(1.0, 1.0, 1.0), "what no resample changes has no error over groups"


def test_common_noise_cancels_in_a_difference():
    noise = np.random.default_rng(0).normal(size=(1, 500))
    one, other = (Score(point_D=np.array([v]), resampled_DR=v + noise) for v in (0.3, 0.1))
    difference = one.minus(other).estimate()
    assert difference.value == pytest.approx(0.2)
    assert difference.low == pytest.approx(0.2)
    with pytest.raises(ValueError, match="compare what was measured on the same ones"):
        one.minus(Score(point_D=np.array([0.1]), resampled_DR=noise[:, :5]))


def test_an_interval_stays_where_the_statistic_must():
    score = Score(point_D=np.array([0.99]), resampled_DR=np.array([[0.8, 1.0, 0.9]]), bounds=(-1.0, 1.0))
    assert score.estimate().high == 1.0


def test_one_group_has_no_interval():
    times = resample_groups(1, 4, np.random.default_rng(0))
    value, low, high = Score(point_D=np.array([0.5]), resampled_DR=times[:, 0][None]).estimate()
    assert value == 0.5
    assert np.isnan([low, high]).all()
