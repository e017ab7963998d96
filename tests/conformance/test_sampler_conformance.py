"""Every sampler under conf/sampler keeps the contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sampler_made import credit_of

CONF = Path(__file__).resolve().parents[2] / "conf" / "sampler"
PATHS = sorted(CONF.glob("*.yaml"))


def configured(path, **changes):
    """The sampler of a file, with the changes to keys that it has; `replace` is False where a sampler never does."""
    config = OmegaConf.load(path)
    return instantiate(config, **{key: value for key, value in changes.items() if key in config})


def replaces(sampler):
    return getattr(sampler, "replace", False)


SAMPLERS = {
    f"{path.stem}-{'with' if replace else 'without'}{'-weighted' if weighted else ''}": configured(
        path, num_episodes=6, replace=replace, importance_weights=weighted
    )
    for path in PATHS
    for replace in ((False, True) if "replace" in OmegaConf.load(path) else (False,))
    for weighted in (False, True)
}
UNWEIGHTED = {name: sampler for name, sampler in SAMPLERS.items() if not sampler.importance_weights}
EVERY_DRAW = pytest.mark.parametrize("sampler", UNWEIGHTED.values(), ids=UNWEIGHTED.keys())
"""Weights change nothing about who is drawn."""
EVERY_SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
POOLS = {
    "normal": np.random.default_rng(0).normal(size=16),
    "half-zero": np.where(np.arange(16) % 2, np.linspace(-2.0, 2.0, 16), 0.0),
    "mostly-zero": np.eye(16)[3] - np.eye(16)[9],
    "all-zero": np.zeros(16),
    "all-equal": np.full(16, -1.0),
    "one-huge": np.concatenate([[1e9], np.full(15, 1e-9)]),
}
EVERY_POOL = pytest.mark.parametrize("adv", POOLS.values(), ids=POOLS.keys())


def groups(size):
    return np.arange(size) // 4


def credit_of_pool(adv):
    """Returns are the advantages; an episode succeeds where it is not much worse than its group."""
    return credit_of(adv, success=adv > -0.2)


def sample(sampler, adv, count, seed=0):
    return sampler(credit_of_pool(adv), groups(adv.size), count, np.random.default_rng(seed))


def test_there_are_configured_samplers():
    assert {path.stem for path in PATHS} >= {
        "uniform", "abs_adv", "pods", "dash", "dynamic", "top_variance", "outcome_gated", "positive_only"
    }  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_config_names_every_argument(path):
    sampler = instantiate(OmegaConf.load(path))
    assert set(OmegaConf.load(path)) - {"_target_"} == set(type(sampler).__dataclass_fields__)
    assert sampler.num_episodes == 1024


@EVERY_SAMPLER
@EVERY_POOL
def test_probabilities_and_inclusion_add_up(sampler, adv):
    selection = sample(sampler, adv, 6)
    assert selection.prob.shape == selection.inclusion.shape == (16,)
    assert selection.prob.sum() == pytest.approx(1.0, abs=1e-12)
    assert selection.inclusion.sum() == pytest.approx(6.0, abs=1e-9)
    assert selection.prob.min() >= 0.0
    assert selection.inclusion.min() >= 0.0
    if not replaces(sampler):
        assert selection.inclusion.max() <= 1.0 + 1e-12


@EVERY_SAMPLER
@EVERY_POOL
@pytest.mark.parametrize("count", [1, 6, 16])
def test_count_range_and_duplicates(sampler, adv, count):
    selection = sample(sampler, adv, count)
    assert selection.index.shape == selection.weight.shape == (count,)
    assert np.issubdtype(selection.index.dtype, np.integer)
    assert selection.index.min() >= 0
    assert selection.index.max() < 16
    assert np.isfinite(selection.weight).all()
    assert (selection.weight > 0.0).all()
    if not replaces(sampler):
        assert np.unique(selection.index).size == count


@EVERY_SAMPLER
@EVERY_POOL
def test_permutation_equivariance(sampler, adv):
    order = np.random.default_rng(5).permutation(16)
    before = sample(sampler, adv, 6)
    after = sampler(credit_of_pool(adv[order]), groups(16)[order], 6, np.random.default_rng(1))
    np.testing.assert_allclose(after.prob, before.prob[order], atol=1e-12)
    np.testing.assert_allclose(after.inclusion, before.inclusion[order], atol=1e-9)


@EVERY_SAMPLER
def test_only_drawable_episodes_are_drawn(sampler):
    for seed in range(50):
        selection = sample(sampler, POOLS["half-zero"], 6, seed)
        assert (selection.inclusion[selection.index] > 0.0).all()


@EVERY_SAMPLER
def test_same_generator_same_selection(sampler):
    first, second = (sample(sampler, POOLS["normal"], 6, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.index, second.index)
    np.testing.assert_array_equal(first.weight, second.weight)


@EVERY_SAMPLER
def test_another_generator_another_selection(sampler):
    drawn = {tuple(sample(sampler, POOLS["normal"], 6, seed).index.tolist()) for seed in range(20)}
    assert len(drawn) > 10


@EVERY_SAMPLER
def test_the_global_generator_is_left_alone(sampler):
    before = np.random.get_state()[1].copy()  # noqa: NPY002 -- what is checked is that nobody uses it
    sample(sampler, POOLS["normal"], 6)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@EVERY_SAMPLER
@pytest.mark.parametrize("adv", [np.zeros(1), np.array([-2.0])])
def test_a_pool_of_one(sampler, adv):
    selection = sample(sampler, adv, 1)
    np.testing.assert_array_equal(selection.index, [0])
    np.testing.assert_array_equal(selection.prob, [1.0])
    np.testing.assert_array_equal(selection.inclusion, [1.0])
    np.testing.assert_array_equal(selection.weight, [1.0])


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS.values() if not replaces(s)], ids=repr)
@EVERY_POOL
def test_the_whole_pool_without_replacement(sampler, adv):
    selection = sample(sampler, adv, 16)
    np.testing.assert_array_equal(np.sort(selection.index), np.arange(16))
    np.testing.assert_array_equal(selection.inclusion, np.ones(16))


@EVERY_SAMPLER
def test_all_zero_advantages_are_uniform(sampler):
    selection = sample(sampler, np.zeros(16), 6)
    np.testing.assert_allclose(selection.prob, np.full(16, 1 / 16), atol=1e-15)
    np.testing.assert_allclose(selection.inclusion, np.full(16, 6 / 16), atol=1e-12)


@EVERY_SAMPLER
def test_the_advantages_are_not_changed(sampler):
    adv = POOLS["normal"].copy()
    sample(sampler, adv, 6)
    np.testing.assert_array_equal(adv, POOLS["normal"])


@EVERY_DRAW
def test_frequency_of_drawing_is_the_reported_inclusion(sampler):
    adv, drawn = POOLS["normal"], np.zeros(16)
    rng = np.random.default_rng(0)
    for _ in range(4000):
        selection = sampler(credit_of_pool(adv), groups(16), 6, rng)
        np.add.at(drawn, selection.index, 1)
    # Five standard errors of a Bernoulli mean, 5·0.5/√4000 = 0.04, and the approximation's 0.01 at this size.
    np.testing.assert_allclose(drawn / 4000, selection.inclusion, rtol=0, atol=0.05)


@EVERY_SAMPLER
def test_importance_weights_undo_the_inclusion(sampler):
    selection = sample(sampler, POOLS["normal"], 6)
    expected = 6 / 16 / selection.inclusion[selection.index] if sampler.importance_weights else np.ones(6)
    np.testing.assert_allclose(selection.weight, expected, atol=1e-12)


@EVERY_DRAW
def test_groups_of_unlike_size(sampler):
    adv, group = POOLS["normal"], np.array([5] * 1 + [2] * 9 + [9] * 2 + [0] * 4)
    rng, drawn = np.random.default_rng(0), np.zeros(16)
    for _ in range(2000):
        selection = sampler(credit_of_pool(adv), group, 5, rng)
        np.add.at(drawn, selection.index, 1)
    assert selection.inclusion.sum() == pytest.approx(5.0, abs=1e-9)
    np.testing.assert_allclose(drawn / 2000, selection.inclusion, rtol=0, atol=0.07)


@EVERY_SAMPLER
def test_group_numbers_are_only_names(sampler):
    adv = POOLS["half-zero"]
    one = sample(sampler, adv, 6)
    other = sampler(credit_of_pool(adv), np.array([7, -3, 0, 99])[groups(16)], 6, np.random.default_rng(0))
    np.testing.assert_allclose(other.inclusion, one.inclusion, atol=1e-12)


@EVERY_DRAW
def test_drawing_order_is_exchangeable(sampler):
    # Any cut of the drawn is a fair mini-batch: the first place is anybody's, by inclusion/K.
    adv, first = POOLS["normal"], np.zeros(16)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        selection = sampler(credit_of_pool(adv), groups(16), 6, rng)
        first[selection.index[0]] += 1
    np.testing.assert_allclose(first / 2000, selection.inclusion / 6, rtol=0, atol=0.045)
