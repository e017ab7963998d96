"""A sampler's bias in numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from msgrpo_lab.sampler.abs_advantage import AbsAdvantage
from msgrpo_lab.sampler.base import diagnose
from msgrpo_lab.sampler.uniform import Uniform
from msgrpo_lab.types import Credit, Selection


def credit_of(adv):
    adv = np.array(adv, dtype=float)
    return Credit(turn_adv=adv[:, None], turn_mask=np.ones((adv.size, 1), dtype=bool), episode_adv=adv)


def test_all_numbers_by_hand():
    # π = (2, 1, 1, 0), drawn 0, 0, 1, 2 with weights 1/2, 1/2, 1, 1; advantages (3, −1, 0, −2), pool mean 0.
    # ess: 4²/(4 · (4 + 1 + 1)) = 16/24 = 2/3.  Drawn mean (3 + 3 − 1 + 0)/4 = 1.25.
    # Seen by the loss: (1.5 + 1.5 − 1 + 0)/4 = 0.5.  One of four drawn has advantage 0.
    selection = Selection(
        index=np.array([0, 0, 1, 2]),
        prob=np.array([0.5, 0.25, 0.25, 0.0]),
        weight=np.array([0.5, 0.5, 1.0, 1.0]),
        inclusion=np.array([2.0, 1.0, 1.0, 0.0]),
    )
    assert diagnose(credit_of([3.0, -1.0, 0.0, -2.0]), selection) == pytest.approx(
        {
            "sampler/ess": 2 / 3,
            "sampler/inclusion_bias": 1.25,
            "sampler/mean_advantage": 0.5,
            "sampler/inclusion_min": 0.0,
            "sampler/inclusion_max": 2.0,
            "sampler/drawn_zero_advantage_share": 0.25,
        },
        abs=1e-15,
    )


def test_bias_is_relative_to_the_pool():
    # Pool mean 2, drawn {4}: bias 2, mean advantage 4.
    selection = Selection(
        index=np.array([1]), prob=np.array([0.5, 0.5]), weight=np.ones(1), inclusion=np.array([0.5, 0.5])
    )
    stats = diagnose(credit_of([0.0, 4.0]), selection)
    assert stats["sampler/inclusion_bias"] == 2.0
    assert stats["sampler/mean_advantage"] == 4.0


@pytest.mark.parametrize("replace", [True, False])
def test_uniform_has_full_effective_size(replace):
    credit = credit_of(np.arange(10.0))
    selection = Uniform(num_episodes=4, replace=replace)(credit, np.zeros(10, dtype=int), 4, np.random.default_rng(0))
    stats = diagnose(credit, selection)
    assert stats["sampler/ess"] == pytest.approx(1.0, abs=1e-12)
    assert stats["sampler/inclusion_min"] == stats["sampler/inclusion_max"] == pytest.approx(0.4)


def test_effective_size_of_one_episode_is_one_in_e():
    credit = credit_of([5.0, 0.0, 0.0, 0.0])
    selection = AbsAdvantage(num_episodes=3, replace=True)(credit, np.zeros(4, dtype=int), 3, np.random.default_rng(0))
    assert diagnose(credit, selection)["sampler/ess"] == pytest.approx(0.25)


def test_the_whole_pool_has_no_bias():
    credit = credit_of([1.0, -2.0, 0.5])
    selection = AbsAdvantage(num_episodes=3)(credit, np.zeros(3, dtype=int), 3, np.random.default_rng(0))
    assert diagnose(credit, selection)["sampler/inclusion_bias"] == pytest.approx(0.0, abs=1e-15)


def test_filled_episodes_show_as_zero_advantage():
    credit = credit_of([1.0, 0.0, 0.0, 0.0, -1.0])
    selection = AbsAdvantage(num_episodes=4)(credit, np.zeros(5, dtype=int), 4, np.random.default_rng(0))
    assert diagnose(credit, selection)["sampler/drawn_zero_advantage_share"] == 0.5


def test_values_are_plain_floats():
    credit = credit_of([1.0, -1.0])
    selection = Uniform(num_episodes=1)(credit, np.zeros(2, dtype=int), 1, np.random.default_rng(0))
    assert {type(value) for value in diagnose(credit, selection).values()} == {float}


def test_mismatch_is_refused():
    credit = credit_of([1.0, -1.0])
    selection = Uniform(num_episodes=1)(credit, np.zeros(2, dtype=int), 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"episode_adv \(3,\).*inclusion \(2,\)"):
        diagnose(credit_of([1.0, 2.0, 3.0]), selection)
