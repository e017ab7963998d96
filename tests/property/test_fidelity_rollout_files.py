"""A rollout that is saved and loaded is the same rollout, to the bit and the type."""

from __future__ import annotations

import math
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fidelity_made import play
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lab_made import small_lab

from msgrpo_lab.fidelity.action_probs import ActionTable
from msgrpo_lab.fidelity.rollout_file import SCHEMA, GameSettings, SavedRollout, load_rollout, save_rollout
from msgrpo_lab.types import Completion, Episode, ParsedAction, RolloutBatch, Sampling, Turn

INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(max_size=8)
NUMBER = st.floats(allow_nan=True, allow_infinity=True)
KEYS = st.recursive(
    TEXT | st.integers() | st.booleans() | st.none(), lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6
)
IDS = arrays(np.int64, st.integers(0, 4), elements=INT64)


@st.composite
def completions(draw: Any) -> Completion:
    tokens = draw(IDS)
    kind = draw(st.sampled_from([np.float32, np.float64]))
    width = 32 if kind is np.float32 else 64
    return Completion(
        prompt_ids=draw(IDS),
        token_ids=tokens,
        logprobs=draw(arrays(kind, tokens.shape, elements=st.floats(width=width, allow_nan=True))),
        text=draw(TEXT),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        policy_version=draw(st.integers(0, 2**40)),
    )


@st.composite
def turns(draw: Any) -> Turn:
    action = draw(st.none() | st.integers(0, 3))
    return Turn(
        observation=draw(TEXT),
        state_key=draw(KEYS),
        completion=draw(completions()),
        parsed=ParsedAction(
            action=action,
            span=draw(st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9))),
            error=draw(st.none() | TEXT),
        ),
        executed_action=draw(st.integers(0, 3)),
        reward=draw(NUMBER),
        game_reward=draw(NUMBER),
    )


@st.composite
def rollouts(draw: Any) -> SavedRollout:
    episodes = tuple(
        Episode(
            group_id=draw(INT64),
            seed=draw(INT64),
            turns=tuple(draw(st.lists(turns(), min_size=1, max_size=4))),
            terminated=draw(st.booleans()),
            truncated=draw(st.booleans()),
            success=draw(st.booleans()),
        )
        for _ in range(draw(st.integers(1, 4)))
    )
    shape = (len(episodes), max(episode.length for episode in episodes))
    exact_ET = None
    if draw(st.booleans()):
        exact_ET = draw(arrays(np.float64, shape, elements=NUMBER))
        exact_ET[np.arange(shape[1]) >= np.array([[episode.length] for episode in episodes])] = 0.0
    texts = tuple(draw(st.lists(TEXT, min_size=1, max_size=3, unique=True)))
    finite = st.floats(0, 1)
    return SavedRollout(
        batch=RolloutBatch(
            episodes=episodes,
            group_index=draw(arrays(np.int64, len(episodes), elements=INT64)),
            exact_adv=exact_ET,
        ),
        scenario=GameSettings(game=draw(TEXT), settings=draw(st.dictionaries(TEXT, finite | TEXT | st.booleans()))),
        sampling=Sampling(
            temperature=draw(st.floats(0.1, 9)),
            top_k=draw(st.none() | st.integers(1, 9)),
            choices=draw(st.none() | st.lists(st.lists(st.integers(0, 99)).map(tuple)).map(tuple)),
            stop=tuple(draw(st.lists(TEXT, max_size=2))),
            greedy=draw(st.booleans()),
        ),
        table=draw(st.none())
        if draw(st.booleans())
        else ActionTable(
            texts=texts,
            prob_XB=draw(arrays(np.float64, (len(texts), 5), elements=finite)),
            standard_error_XB=draw(arrays(np.float64, (len(texts), 5), elements=finite)),
            exact=draw(st.booleans()),
        ),
        origin=draw(st.dictionaries(TEXT, TEXT | st.integers(-9, 9))),
    )


def assert_same(one: Any, other: Any, at: str = "") -> None:
    """Equal in value, type and bits, all the way down."""
    assert type(one) is type(other), at
    if is_dataclass(one):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name), f"{at}.{field.name}")
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), at
        assert one.tobytes() == other.tobytes(), at
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(other), at
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{at}[{number}]")
    elif isinstance(one, float) and math.isnan(one):
        assert math.isnan(other), at
    else:
        assert one == other, at
        assert not isinstance(one, float) or math.copysign(1, one) == math.copysign(1, other), at


def there_and_back(saved: SavedRollout) -> SavedRollout:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rollout.parquet"
        save_rollout(path, saved)
        assert [child.name for child in Path(folder).iterdir()] == ["rollout.parquet"]
        return load_rollout(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(saved=rollouts())
def test_there_and_back_is_the_same(saved: SavedRollout) -> None:
    assert_same(there_and_back(saved), saved)


def test_a_played_rollout_and_its_truth_come_back() -> None:
    played = play(groups=12, silence=0.1)
    loaded = there_and_back(played.saved)
    assert_same(loaded, played.saved)
    assert any(turn.parsed.action is None for episode in loaded.batch.episodes for turn in episode.turns)
    truth = loaded.truth()
    np.testing.assert_array_equal(truth.advantages(loaded.batch), played.batch.exact_adv)
    np.testing.assert_array_equal(truth.gradient(loaded.batch), played.truth.gradient(played.batch))


@pytest.mark.parametrize("env", ["frozenlake", "snake_poison_banana"])
def test_a_language_models_rollout_comes_back(env: str) -> None:
    """Snake's keys are nested, and its settings are no attributes of the game; both come back."""
    data = small_lab(f"env={env}").data
    batch = data.collect(0, 0)
    saved = SavedRollout(
        batch=batch, scenario=GameSettings.of(data.collector.make_game), sampling=data.sampling, table=None
    )
    loaded = there_and_back(saved)
    assert_same(loaded, saved)
    assert {"horizon", "shaping", "invalid_penalty"} <= set(loaded.scenario.settings)
    shared = {id(turn.completion) for episode in loaded.batch.episodes for turn in episode.turns}
    assert len(shared) < batch.num_turns.sum(), "equal completions are one object again"


def test_the_file_is_open_and_flat(tmp_path: Path) -> None:
    """One row a turn, no nested column, readable by anything that reads Parquet."""
    played = play(groups=3)
    save_rollout(tmp_path / "rollout.parquet", played.saved)
    frame = pq.read_table(tmp_path / "rollout.parquet").to_pandas()
    assert len(frame) == played.batch.num_turns.sum()
    assert list(frame.columns) == SCHEMA.names
    assert not any(str(field.type).startswith(("list", "struct", "map")) for field in SCHEMA)
    rewards = frame.groupby("episode").reward.sum()
    np.testing.assert_allclose(rewards, [episode.ret for episode in played.batch.episodes], atol=1e-12)
