"""Exact credit: what the oracle filled in, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from credit_made import Played, batch_of, rollout_of

from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.credit.exact import Exact

FILLED = rollout_of(
    [Played(rewards=[0.0, 1.0], exact=[3.0, -1.0], tokens=[1, 2]), Played(rewards=[0.0], exact=[-2.0], tokens=[3])],
    [0, 0],
)


def test_the_oracles_numbers_are_the_credit():
    credit = Exact()(FILLED)
    np.testing.assert_array_equal(credit.turn_adv, [[3.0, -1.0], [-2.0, 0.0]])
    np.testing.assert_array_equal(credit.turn_mask, [[True, True], [True, False]])
    np.testing.assert_array_equal(credit.episode_adv, EpisodeReturn()(FILLED).episode_adv)


@pytest.mark.parametrize(
    ("weighting", "mean_square"),
    [
        ("step", 14 / 3),  # 9, 1, 4
        ("episode", 9 / 2),  # (9 + 1)/2 and 4
        ("token", 23 / 6),  # (9 + 2·1 + 3·4)/6
    ],
)
def test_one_scale_for_the_whole_rollout(weighting, mean_square):
    scale = np.sqrt(mean_square) + 1e-6
    credit = Exact(normalise="batch", baseline_weighting=weighting)(FILLED)
    np.testing.assert_allclose(credit.turn_adv, np.array([[3.0, -1.0], [-2.0, 0.0]]) / scale, atol=1e-12)


def test_nothing_known_to_matter_is_nothing():
    batch = replace(FILLED, exact_adv=np.zeros((2, 2)))
    np.testing.assert_array_equal(Exact(normalise="batch")(batch).turn_adv, np.zeros((2, 2)))


def test_the_batch_is_left_as_it_was():
    before = FILLED.exact_adv.copy()
    Exact()(FILLED).turn_adv[:] = 7.0
    np.testing.assert_array_equal(FILLED.exact_adv, before)


@pytest.mark.parametrize(
    ("exact_adv", "message"),
    [
        (None, r"credit=exact needs RolloutBatch\.exact_adv, which is None: .*another credit rule"),
        (np.zeros((2, 3)), r"exact_adv has shape \(2, 3\): credit=exact needs \(2, 2\)"),
        (np.zeros(3), r"exact_adv has shape \(3,\)"),
        (np.array([[0.0, np.nan], [0.0, 0.0]]), r"exact_adv\[0, 1\]=nan: must be finite"),
        (np.array([[0.0, 0.0], [0.0, 2.0]]), r"exact_adv\[1, 1\]=2\.0: .*0 past the episode's end"),
    ],
)
def test_what_the_oracle_did_not_fill_is_refused(exact_adv, message):
    with pytest.raises(ValueError, match=message) as error:
        Exact()(replace(batch_of([[0.0, 1.0], [0.0]], [0, 0]), exact_adv=exact_adv))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normalise": "std"}, r"credit\.normalise='std'.*none, batch"),
        ({"baseline_weighting": "row"}, r"credit\.baseline_weighting='row'"),
        ({"delta": -1.0}, r"credit\.delta=-1\.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        Exact(**arguments)
    assert "\n" not in str(error.value)
