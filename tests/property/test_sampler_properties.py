"""Properties of sampling probabilities, inclusion and draws on arbitrary advantages."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampler_made import credit_of

from msgrpo_lab.sampler.abs_advantage import AbsAdvantage, abs_advantage_prob
from msgrpo_lab.sampler.base import draw, group_spread, inclusion_of
from msgrpo_lab.sampler.dash import Dash
from msgrpo_lab.sampler.dynamic import Dynamic
from msgrpo_lab.sampler.outcome_gated import OutcomeGated
from msgrpo_lab.sampler.pods import PODS, draw_max_variance, max_variance_inclusion
from msgrpo_lab.sampler.positive_only import PositiveOnly
from msgrpo_lab.sampler.strata import whole_quotas
from msgrpo_lab.sampler.top_variance import TopVariance

ADVANTAGES = st.lists(st.one_of(st.just(0.0), st.floats(-10, 10, allow_subnormal=False)), min_size=1, max_size=40).map(
    np.array
)
ALPHAS = st.one_of(st.just(0.0), st.floats(0.1, 4.0))
FLOORS = st.one_of(st.just(0.0), st.floats(1e-6, 3.0))
SEEDS = st.integers(0, 2**32 - 1)


@given(ADVANTAGES, ALPHAS, FLOORS)
def test_probabilities_are_a_distribution(adv, alpha, floor):
    prob = abs_advantage_prob(adv, alpha=alpha, floor=floor)
    assert prob.shape == adv.shape
    assert (prob >= 0.0).all()
    assert prob.sum() == pytest.approx(1.0, abs=1e-12)


@given(ADVANTAGES, ALPHAS, FLOORS)
def test_probabilities_grow_with_the_size_of_the_advantage(adv, alpha, floor):
    prob = abs_advantage_prob(adv, alpha=alpha, floor=floor)
    order = np.argsort(np.abs(adv), kind="stable")
    assert (np.diff(prob[order]) >= -1e-15).all() or not adv.any()


@given(ADVANTAGES, st.floats(0.1, 4.0), st.floats(0.01, 100.0))
def test_probabilities_do_not_depend_on_the_scale_without_a_floor(adv, alpha, factor):
    np.testing.assert_allclose(
        abs_advantage_prob(factor * adv, alpha=alpha), abs_advantage_prob(adv, alpha=alpha), atol=1e-9
    )


@given(ADVANTAGES, st.floats(0.1, 3.0), st.floats(0.001, 2.0))
def test_probabilities_are_the_formulas(adv, alpha, floor):
    weight = np.abs(adv) ** alpha + floor
    np.testing.assert_allclose(abs_advantage_prob(adv, alpha=alpha, floor=floor), weight / weight.sum(), atol=1e-12)


@given(ADVANTAGES, ALPHAS, FLOORS, st.data())
def test_inclusion_without_replacement(adv, alpha, floor, data):
    prob = abs_advantage_prob(adv, alpha=alpha, floor=floor)
    count = data.draw(st.integers(1, adv.size))
    inclusion = inclusion_of(prob, count, replace=False)
    assert inclusion.sum() == pytest.approx(count, abs=1e-8)
    assert ((inclusion >= 0.0) & (inclusion <= 1.0)).all()
    order = np.argsort(prob, kind="stable")
    assert (np.diff(inclusion[order]) >= -1e-12).all()


@given(ADVANTAGES, st.data())
def test_inclusion_grows_with_the_number_drawn(adv, data):
    if adv.size < 2:
        adv = np.array([1.0, 2.0])
    prob = abs_advantage_prob(adv)
    count = data.draw(st.integers(1, adv.size - 1))
    fewer, more = (inclusion_of(prob, k, replace=False) for k in (count, count + 1))
    assert (more >= fewer - 1e-9).all()


@given(ADVANTAGES, SEEDS, st.data())
def test_draws_take_non_zero_episodes_first(adv, seed, data):
    prob = abs_advantage_prob(adv)
    count = data.draw(st.integers(1, adv.size))
    index = draw(prob, count, np.random.default_rng(seed), replace=False)
    assert np.unique(index).size == count
    assert (prob[index] > 0.0).sum() == min(count, (prob > 0.0).sum())


@given(ADVANTAGES, st.floats(0.05, 3.0), st.booleans(), SEEDS)
def test_importance_weighted_inclusion_is_uniform(adv, floor, replace, seed):
    # inclusion_i · weight_i = K/E for each drawn episode: the reweighted draw counts all episodes alike.
    count = max(1, adv.size // 2)
    sampler = AbsAdvantage(num_episodes=count, floor=floor, replace=replace, importance_weights=True)
    selection = sampler(credit_of(adv), np.zeros(adv.size, dtype=int), count, np.random.default_rng(seed))
    np.testing.assert_allclose(
        selection.inclusion[selection.index] * selection.weight, np.full(count, count / adv.size), atol=1e-12
    )


# --- samplers that choose among classes ----------------------------------------------------------------------------

RETURNS = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, 0.1 + 0.2, 0.3]), st.floats(-10, 10, allow_subnormal=False)),
    min_size=1,
    max_size=24,
).map(np.array)
FILTERS = {
    "pods": PODS(num_episodes=1),
    "pods-pool": PODS(num_episodes=1, scope="pool"),
    "dash": Dash(num_episodes=1, threshold=0.5),
    "dynamic": Dynamic(num_episodes=1),
    "top_variance": TopVariance(num_episodes=1, keep=0.3),
    "outcome_gated": OutcomeGated(num_episodes=1, success_share=0.35),
    "positive_only": PositiveOnly(num_episodes=1),
}
OF_RETURNS = ("pods", "dynamic", "top_variance")


@pytest.mark.parametrize("sampler", FILTERS.values(), ids=FILTERS.keys())
@given(returns=RETURNS, seed=SEEDS, data=st.data())
def test_exactly_so_many_are_drawn_and_only_those_that_can_be(sampler, returns, seed, data):
    rng = np.random.default_rng(seed)
    group = rng.integers(4, size=returns.size)
    count = data.draw(st.integers(1, returns.size))
    selection = sampler(credit_of(returns), group, count, rng)
    assert np.unique(selection.index).size == count
    assert selection.inclusion.sum() == pytest.approx(count, abs=1e-8)
    assert ((selection.inclusion >= 0.0) & (selection.inclusion <= 1.0 + 1e-12)).all()
    assert (selection.inclusion[selection.index] > 0.0).all()
    assert np.isin(np.flatnonzero(selection.inclusion >= 1.0 - 1e-12), selection.index).all()  # the certain are there
    np.testing.assert_allclose(selection.prob, selection.inclusion / count, atol=1e-15)


@pytest.mark.parametrize("name", OF_RETURNS)
@given(seed=SEEDS, shift=st.integers(-50, 50))
def test_what_all_episodes_of_a_group_earn_alike_does_not_matter(name, seed, shift):
    rng = np.random.default_rng(seed)
    returns, group = rng.integers(4, size=20).astype(float), rng.integers(4, size=20)
    before, after = (
        FILTERS[name](credit_of(value), group, 7, np.random.default_rng(seed))
        for value in (returns, returns + shift * (group + 1))
    )
    np.testing.assert_allclose(after.inclusion, before.inclusion, atol=1e-12)
    np.testing.assert_array_equal(after.index, before.index)


@given(
    value=st.lists(st.one_of(st.integers(0, 2), st.floats(-5, 5, allow_subnormal=False)), min_size=1, max_size=8),
    seed=SEEDS,
    data=st.data(),
)
def test_the_max_variance_subset_is_the_best_of_all(value, seed, data):
    value = np.round(np.array(value, dtype=float), 6)
    size = data.draw(st.integers(1, value.size))
    best = max(np.var(value[list(subset)]) for subset in combinations(range(value.size), size))
    subset = draw_max_variance(value, size, np.random.default_rng(seed))
    assert np.var(value[subset]) == pytest.approx(best, abs=1e-7)
    inclusion = max_variance_inclusion(value, size)
    assert inclusion.sum() == pytest.approx(size, abs=1e-9)
    assert (inclusion[subset] > 0.0).all()


@given(st.lists(st.floats(0, 5), min_size=1, max_size=12), SEEDS)
def test_whole_quotas_keep_the_total(parts, seed):
    quota = np.array([*parts, np.ceil(sum(parts)) - sum(parts)])
    count = whole_quotas(quota, np.random.default_rng(seed))
    assert count.sum() == round(quota.sum())
    assert (np.abs(count - quota) < 1.0 + 1e-9).all()
    assert (count >= 0).all()


@given(RETURNS, SEEDS)
def test_spread_does_not_depend_on_the_order_of_the_episodes(returns, seed):
    rng = np.random.default_rng(seed)
    group, order = rng.integers(3, size=returns.size), rng.permutation(returns.size)
    np.testing.assert_array_equal(group_spread(returns[order], group[order]), group_spread(returns, group)[order])
