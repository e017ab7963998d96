"""What cannot be read, or not be written, is told in one line; nothing half-made is left."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fidelity_made import Played, play
from lab_made import rollout

from msgrpo_lab.fidelity.rollout_file import (
    META,
    VERSION,
    WITHOUT_DIGEST,
    GameSettings,
    as_columns,
    content_digest,
    load_rollout,
    save_rollout,
)
from msgrpo_lab.files import written_whole
from msgrpo_lab.tsmg.frozen_lake import FrozenLake


@pytest.fixture(scope="module")
def played() -> Played:
    return play(groups=3, group_size=3)


@pytest.fixture
def file(tmp_path: Path, played: Played) -> Path:
    """A file of the earlier layout, which has no checksum that would be told before anything else."""
    path = tmp_path / "rollout.parquet"
    save_rollout(path, played.saved)
    changed(path, schema=WITHOUT_DIGEST)
    return path


def changed(path: Path, **meta: object) -> None:
    """The same rows with other metadata."""
    table = pq.read_table(path)
    known = json.loads(table.schema.metadata[META])
    pq.write_table(table.replace_schema_metadata({META: json.dumps({**known, **meta})}), path)


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match=r"^rollouts=") as told:
        load_rollout(path)
    text = str(told.value)
    assert "\n" not in text
    assert text.startswith(f"rollouts={path}: ")
    assert "; " in text, "and what to do about it"
    return text.removeprefix(f"rollouts={path}: ")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.parquet").startswith("there is no such file; give a file")
    assert refused(tmp_path).startswith("is a folder; give a file")


@pytest.mark.parametrize("content", [b"", b"PA", b"col,umn\n1,2\n" * 99])
def test_a_file_that_is_not_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rollout.parquet"
    path.write_bytes(content)
    assert refused(path).startswith("is no Parquet file; give a file")


@pytest.mark.parametrize("share", [0.0005, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: max(4, int(share * len(content)))])
    assert refused(file).startswith("is cut short; copy it again")


def test_a_file_with_wrong_bytes_inside(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2000:-1000] = bytes(1000)
    file.write_bytes(content)
    assert refused(file).startswith(("is damaged (", "is Parquet, but no rollout", "holds what no rollout has"))


def test_another_schema_version(file: Path) -> None:
    changed(file, schema="msgrpo_lab.rollouts/3")
    assert refused(file).startswith(f"has the schema msgrpo_lab.rollouts/3; this version reads {VERSION}; save")


def test_parquet_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"x": [1, 2]}), path)
    assert refused(path).startswith("is Parquet, but no rollout; give a file")


def test_missing_columns_are_named(file: Path) -> None:
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["reward", "logprobs"]), file)
    assert refused(file).startswith("lacks the columns logprobs, reward; save the rollout again")


def test_a_column_of_another_type_is_named(file: Path) -> None:
    table = pq.read_table(file)
    at = table.schema.get_field_index("reward")
    texts = pa.array([str(value) for value in table["reward"].to_pylist()])
    pq.write_table(table.set_column(at, "reward", texts), file)
    assert refused(file).startswith("has string in column reward, which is double; save the rollout again")


def test_rows_in_another_order(file: Path) -> None:
    table = pq.read_table(file)
    pq.write_table(table.take(list(range(len(table)))[::-1]), file)
    assert "the rows are not whole episodes in order" in refused(file)


def test_a_file_without_rows(file: Path) -> None:
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    assert "the rows are not whole episodes in order" in refused(file)


def test_a_file_that_lost_a_turn(file: Path) -> None:
    table = pq.read_table(file)
    pq.write_table(pa.concat_tables([table.slice(0, 1), table.slice(2)]), file)
    assert "the rows are not whole episodes in order" in refused(file)


def test_values_that_no_rollout_has(file: Path) -> None:
    changed(file, sampling={"temperature": 1.0})
    assert refused(file).startswith("holds what no rollout has (KeyError")


def test_a_state_key_is_read_as_a_literal_and_never_run(file: Path) -> None:
    table = pq.read_table(file)
    at = table.schema.get_field_index("state_key")
    text = pa.array(["__import__('os').getcwd()"] * len(table))
    pq.write_table(table.set_column(at, table.schema.field(at), text), file)
    assert refused(file).startswith("holds what no rollout has (ValueError: malformed")


# The checksum -------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path, played: Played) -> Path:
    path = tmp_path / "whole.parquet"
    save_rollout(path, played.saved)
    return path


def test_changed_rows_and_changed_metadata_are_refused(whole: Path) -> None:
    table = pq.read_table(whole)
    at = table.schema.get_field_index("reward")
    richer = pa.array([value + 1.0 for value in table["reward"].to_pylist()], pa.float64())
    pq.write_table(table.set_column(at, table.schema.field(at), richer), whole)
    assert refused(whole).startswith("is damaged (its checksum is another); copy it again")
    text = table.schema.metadata[META].replace(b'"update": 7', b'"update": 8')
    assert text != table.schema.metadata[META]
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, META: text}), whole)
    assert refused(whole).startswith("is damaged (its checksum is another)")


def test_a_file_of_this_version_without_a_checksum_is_refused(whole: Path) -> None:
    changed(whole)
    assert refused(whole).startswith("is damaged (its checksum is another)")


def test_a_file_of_the_earlier_version_is_read_with_a_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_rollout(file)
    assert "without a checksum: damage to it cannot be told" in caplog.text


def content(path: Path) -> tuple[object, ...]:
    """All that a loaded rollout says."""
    saved = load_rollout(path)
    assert saved.table is not None
    table = (saved.table.texts, saved.table.prob_XB.tobytes(), saved.table.standard_error_XB.tobytes())
    plain = (saved.scenario, saved.sampling, saved.origin, table)
    return repr(plain), content_digest(as_columns(saved.batch), b"")


def test_any_flipped_byte_is_refused_or_changes_nothing(whole: Path) -> None:
    """Bytes that change nothing are those of Parquet's own statistics and the like."""
    original, before = whole.read_bytes(), content(whole)
    rng = np.random.default_rng(0)
    refusals = 0
    for at in [*range(8), *range(len(original) - 8, len(original)), *rng.integers(len(original), size=300).tolist()]:
        damaged = bytearray(original)
        damaged[at] ^= int(rng.integers(1, 256))
        whole.write_bytes(damaged)
        try:
            assert content(whole) == before, f"byte {at}"
        except ValueError as error:
            refusals += str(error).startswith(f"rollouts={whole}: ")
    assert refusals > 150


# Truth --------------------------------------------------------------------------------------------------------------


def test_a_game_without_an_oracle(played: Played) -> None:
    snake = replace(played.saved, scenario=GameSettings(game="Snake", settings={}))
    with pytest.raises(ValueError, match=r"^game Snake has no oracle to hold credit against; save a rollout of Frozen"):
        snake.truth()


def test_a_file_without_action_probabilities(played: Played) -> None:
    with pytest.raises(ValueError, match="no action probabilities are saved with the rollout; save it by callbacks"):
        replace(played.saved, table=None).truth()


def test_settings_of_another_version(played: Played) -> None:
    scenario = GameSettings(game="FrozenLake", settings={"wind": 3})
    with pytest.raises(ValueError, match=r"settings of FrozenLake: .*'wind'; save the rollout again"):
        replace(played.saved, scenario=scenario).truth()


def test_probabilities_of_another_rollout(played: Played) -> None:
    with pytest.raises(ValueError, match="are not in the table"):
        replace(played.saved, table=played.table.select(played.table.texts[:3])).truth()


# Writing ------------------------------------------------------------------------------------------------------------


def test_settings_hold_every_argument() -> None:
    scenario = GameSettings.of(partial(FrozenLake, size=5, slippery=True))
    assert scenario.game == "FrozenLake"
    assert scenario.settings["size"] == 5
    assert scenario.settings["horizon"] == 8, "a default may be another one later"
    with pytest.raises(ValueError, match=r"must be a game's class, or functools\.partial of one"):
        GameSettings.of(lambda: FrozenLake(size=5))


def test_what_no_column_can_hold_is_told(tmp_path: Path, played: Played) -> None:
    episode = played.batch.episodes[0]
    turn = episode.turns[0]

    def saving(episode: object) -> object:
        batch = replace(played.batch, episodes=(episode, *played.batch.episodes[1:]))
        return partial(save_rollout, tmp_path / "x.parquet", replace(played.saved, batch=batch))

    with pytest.raises(ValueError, match="episode 0 has no turns: leave unplayed episodes out"):
        saving(replace(episode, turns=()))()
    with pytest.raises(ValueError, match=r"state_key=.* cannot be kept in a file; make it of tuples"):
        saving(replace(episode, turns=(replace(turn, state_key=object()),)))()
    half = replace(turn.completion, logprobs=turn.completion.logprobs.astype(np.float16))
    with pytest.raises(ValueError, match=r"Completion\.logprobs has the type float16"):
        saving(replace(episode, turns=(replace(turn, completion=half),)))()
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_what_stood_there(tmp_path: Path, played: Played) -> None:
    path = tmp_path / "rollout.parquet"
    save_rollout(path, played.saved)
    before = path.read_bytes()

    def write_half() -> None:
        with written_whole(path) as stream:
            stream.write(b"half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_half()
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["rollout.parquet"]
    with pytest.raises(ValueError, match="no turns"):
        save_rollout(path, replace(played.saved, batch=rollout((0, True, []))))
    assert path.read_bytes() == before
