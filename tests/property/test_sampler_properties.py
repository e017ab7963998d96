"""Properties of sampling probabilities, inclusion and draws on arbitrary advantages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msgrpo_lab.sampler.abs_advantage import AbsAdvantage, abs_advantage_prob
from msgrpo_lab.sampler.base import draw, inclusion_of
from msgrpo_lab.types import Credit

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
    credit = Credit(turn_adv=adv[:, None], turn_mask=np.ones((adv.size, 1), dtype=bool), episode_adv=adv)
    selection = sampler(credit, np.zeros(adv.size, dtype=int), count, np.random.default_rng(seed))
    np.testing.assert_allclose(
        selection.inclusion[selection.index] * selection.weight, np.full(count, count / adv.size), atol=1e-12
    )
