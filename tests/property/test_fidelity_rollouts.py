"""Rollouts of many scenarios, saved and loaded: the same turns, and the same truth recomputed from the file alone.

That every value of every column comes back is in `test_fidelity_rollout_files.py`, on values that no game has played.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fidelity_made import play
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab_made import small_lab

from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.fidelity.meter import measure, yardstick_of
from msgrpo_lab.fidelity.rollout_file import GameSettings, SavedRollout, load_rollout, save_rollout
from msgrpo_lab.fidelity.statistics import resample_groups

LAKE = ("env.horizon=6", "rollout.num_groups=6", "rollout.group_size=4")
FREE = ("rollout.sampling.constrain=false", "rollout.sampling.max_new_tokens=2", "rollout.truth_completions=8")


def assert_same_rollout(loaded: SavedRollout, saved: SavedRollout) -> None:
    """Equal turn by turn and bit by bit, and so is what is true of them."""
    assert len(loaded.batch.episodes) == len(saved.batch.episodes)
    for one, other in zip(loaded.batch.episodes, saved.batch.episodes, strict=True):
        assert replace(one, turns=()) == replace(other, turns=())
        assert one.length == other.length
        for mine, theirs in zip(one.turns, other.turns, strict=True):
            for name in ("prompt_ids", "token_ids", "logprobs"):
                array, expected = getattr(mine.completion, name), getattr(theirs.completion, name)
                assert (array.dtype, array.tobytes()) == (expected.dtype, expected.tobytes())
            for name in ("text", "finish_reason", "policy_version"):
                assert getattr(mine.completion, name) == getattr(theirs.completion, name)
            for name in ("observation", "state_key", "parsed", "executed_action", "reward", "game_reward"):
                assert getattr(mine, name) == getattr(theirs, name)
    np.testing.assert_array_equal(loaded.batch.group_index, saved.batch.group_index)
    np.testing.assert_array_equal(loaded.batch.exact_adv, saved.batch.exact_adv)
    assert loaded.sampling == saved.sampling
    assert loaded.scenario == saved.scenario
    assert loaded.origin == saved.origin
    np.testing.assert_array_equal(loaded.truth().advantages(loaded.batch), saved.batch.exact_adv)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slippery=st.booleans(),
    horizon=st.integers(1, 12),
    groups=st.integers(1, 8),
    group_size=st.integers(1, 5),
    skill=st.sampled_from([0.0, 0.5, 1.0]),
    silence=st.sampled_from([0.0, 0.2, 0.9]),
    seed=st.integers(0, 999),
)
def test_any_scenario_comes_back_with_its_truth(tmp_path: Path, silence: float, **scenario: int) -> None:
    saved = play(silence=silence, **scenario).saved
    save_rollout(tmp_path / "rollout.parquet", saved)
    assert_same_rollout(load_rollout(tmp_path / "rollout.parquet"), saved)


def test_the_scenarios_hold_what_they_are_about(tmp_path: Path) -> None:
    """Several maps, lengths, outcomes and answers, so that the test above is not about copies of one episode."""
    batch = play(groups=12, silence=0.2, skill=0.7).batch
    turns = [turn for episode in batch.episodes for turn in episode.turns]
    assert len({turn.state_key[0] for turn in turns}) > 5
    assert len(set(batch.num_turns.tolist())) > 3
    assert {episode.success for episode in batch.episodes} == {True, False}
    assert {episode.truncated for episode in batch.episodes} == {True, False}
    assert {turn.parsed.action for turn in turns} == {None, 0, 1, 2, 3}
    assert any(turn.parsed.action is not None and turn.parsed.action != turn.executed_action for turn in turns) or any(
        turn.parsed.action is None and turn.executed_action in range(4) for turn in turns
    )


@pytest.mark.parametrize("decoding", [(), FREE], ids=["constrained", "free"])
@pytest.mark.parametrize("env", ["frozenlake", "frozenlake_slippery"])
def test_a_language_models_rollout_comes_back_with_its_truth(
    env: str, decoding: tuple[str, ...], tmp_path: Path
) -> None:
    """Free answers of an untrained model are ⊥ again and again, and its action probabilities are estimates."""
    data = small_lab(f"env={env}", *LAKE, *decoding).data
    data.truth_askers.append(lambda _: True)
    batch, _ = data.pool(0, 0)
    assert data.truth is not None
    saved = SavedRollout(
        batch=batch,
        scenario=GameSettings.of(data.collector.make_game),
        sampling=data.sampling,
        table=data.truth.table,
        origin={"env": env, "seed": 0},
    )
    path = tmp_path / "rollout.parquet"
    save_rollout(path, saved)
    loaded = load_rollout(path)
    assert_same_rollout(loaded, saved)
    assert loaded.table is not None
    assert loaded.table.exact is not bool(decoding)
    np.testing.assert_array_equal(loaded.table.prob_XB, data.truth.table.prob_XB)
    np.testing.assert_array_equal(loaded.table.standard_error_XB, data.truth.table.standard_error_XB)
    assert pq.read_table(path)["action"].null_count == sum(
        turn.parsed.action is None for episode in batch.episodes for turn in episode.turns
    )
    assert (pq.read_table(path)["action"].null_count > 0) is bool(decoding)


def test_the_meter_says_of_the_file_what_it_said_of_the_rollout(tmp_path: Path) -> None:
    played = play(groups=20)
    save_rollout(tmp_path / "rollout.parquet", played.saved)
    loaded = load_rollout(tmp_path / "rollout.parquet")
    times = resample_groups(20, 20, np.random.default_rng(0))
    before = measure(played.yardstick, EpisodeReturn()(played.batch), times)
    after = measure(yardstick_of(loaded.batch, loaded.truth()), EpisodeReturn()(loaded.batch), times)
    for name, score in before.items():
        np.testing.assert_array_equal(after[name].point_D, score.point_D, err_msg=name)
        np.testing.assert_array_equal(after[name].resampled_DR, score.resampled_DR, err_msg=name)
