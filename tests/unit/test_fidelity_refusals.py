"""A rollout file that cannot be compared, and a command line that asks for it wrongly: one line, exit code 2.

The reader's own messages are in `test_fidelity_bad_files.py`, most of the command line's in `test_compare_command.py`;
here files go wrong between the two, and values do that Parquet and its schema have no objection to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fidelity_made import Played, play
from lab_made import small_lab

from msgrpo_lab import compare as command
from msgrpo_lab.credit.rloo import RLOO
from msgrpo_lab.fidelity.meter import draw_repeatedly, measure
from msgrpo_lab.fidelity.rollout_file import META, WITHOUT_DIGEST, GameSettings, SavedRollout, save_rollout
from msgrpo_lab.fidelity.statistics import resample_groups
from msgrpo_lab.sampler.base import with_outcomes
from msgrpo_lab.sampler.uniform import Uniform

QUIET = ("logger=null", "credit=rloo", "sampler=uniform", "draws=2", "resamples=8", "output=found")


@pytest.fixture(scope="module")
def played() -> Played:
    return play(groups=6, group_size=4)


@pytest.fixture
def file(tmp_path: Path, played: Played, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound rollout, in the folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rollout.parquet"
    save_rollout(path, played.saved)
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as stopped:
        command.main([*QUIET, *arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert printed.out == ""
    assert line.startswith("msgrpo_lab: ")
    return line.removeprefix("msgrpo_lab: ")


def test_a_sound_file_is_compared(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is refused below is refused for its fault alone."""
    command.main([*QUIET, f"rollouts={file}"])
    assert capsys.readouterr().err == ""
    assert (file.parent / "found" / "table.csv").is_file()


# Files --------------------------------------------------------------------------------------------------------------


def meta_of(path: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(pq.read_schema(path).metadata[META])
    return known


def with_meta(path: Path, **changes: Any) -> None:
    """Other metadata, in a file of the earlier layout: it has no checksum that would be told before anything else."""
    content = json.dumps({**meta_of(path), "schema": WITHOUT_DIGEST, **changes})
    pq.write_table(pq.read_table(path).replace_schema_metadata({META: content}), path)


def with_column(path: Path, name: str, change: Callable[[list[Any]], list[Any]]) -> None:
    table = pq.read_table(path)
    at = table.schema.get_field_index(name)
    field = table.schema.field(at)
    column = pa.array(change(table[name].to_pylist()), type=field.type)
    pq.write_table(table.set_column(at, field, column), path)
    with_meta(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def text_instead(path: Path) -> None:
    path.write_text("episode,turn,reward\n0,0,1.0\n")


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def table_of(path: Path, change: Callable[[Any], Any], key: str = "prob") -> None:
    table = meta_of(path)["table"]
    with_meta(path, table={**table, key: change(table[key])})


FAULTS: dict[str, tuple[Callable[[Path], object], str | tuple[str, str]]] = {
    "another schema version": (
        lambda path: with_meta(path, schema="msgrpo_lab.rollouts/99"),
        "has the schema msgrpo_lab.rollouts/99; this version reads msgrpo_lab.rollouts/2; save the rollout again",
    ),
    "truncated": (cut, "is cut short; copy it again, or save the rollout again"),
    "not Parquet": (text_instead, "is no Parquet file; give a file that callbacks.rollouts has written"),
    "empty": (lambda path: path.write_bytes(b""), "is no Parquet file; give a file"),
    "missing": (lambda path: path.unlink(), "there is no such file; give a file"),
    "a folder": (folder_instead, "is a folder; give a file"),
    "a missing column": (
        lambda path: pq.write_table(pq.read_table(path).drop_columns(["reward"]), path),
        "lacks the column reward; save the rollout again",
    ),
    "a game without an oracle": (
        lambda path: with_meta(path, game="Snake"),
        "game Snake has no oracle to hold credit against; save a rollout of FrozenLake (env=frozenlake)",
    ),
    "other settings": (
        lambda path: with_meta(path, settings={**meta_of(path)["settings"], "frozen_probability": 0.6}),
        ("texts: ", "episode 0: was played on the map "),
    ),
    "settings out of range": (
        lambda path: with_meta(path, settings={**meta_of(path)["settings"], "size": 99}),
        "settings of FrozenLake: env.size=99: must be at least 2 and at most 16; save the rollout again",
    ),
    "a shorter horizon": (
        lambda path: with_meta(path, settings={**meta_of(path)["settings"], "horizon": 1}),
        "episode 0: has ",
    ),
    "settings that are no mapping": (lambda path: with_meta(path, settings=7), "holds what no rollout has (TypeError"),
    "an action that the game has not": (
        lambda path: with_column(path, "action", lambda values: [9, *values[1:]]),
        "episode 0, turn 0: action=9, where there are 4 actions, 0 to 3; save the rollout again",
    ),
    "a state of another game": (
        lambda path: with_column(path, "state_key", lambda values: ["7", *values[1:]]),
        "episode 0, turn 0: state_key=7 is no map with one of its cells; save the rollout again",
    ),
    "a cell beyond the map": (
        lambda path: with_column(path, "state_key", lambda values: [values[0].replace(", 0)", ", 77)"), *values[1:]]),
        "episode 0, turn 0: state_key=('",
    ),
    "another seed": (
        lambda path: with_column(path, "seed", lambda values: [seed + 1 for seed in values]),
        ("texts: ", "episode 0: was played on the map "),
    ),
    "a reward that is no number": (
        lambda path: with_column(path, "reward", lambda values: [float("nan"), *values[1:]]),
        "Turn.reward=nan in episode 0, turn 0: must be finite",
    ),
    "a half token": (
        lambda path: with_column(path, "token_ids", lambda values: [values[0][:-1], *values[1:]]),
        "holds what no rollout has (ValueError",
    ),
    "probabilities of fewer texts": (
        lambda path: table_of(path, lambda rows: rows[:-1]),
        "holds what no rollout has (ValueError: ",
    ),
    "probabilities that do not add up": (
        lambda path: table_of(path, lambda rows: [[0.9] * 5, *rows[1:]]),
        "action probabilities have the shape (",
    ),
    "probabilities of another number of answers": (
        lambda path: [
            table_of(path, lambda rows: [[1.0, 0.0] for _ in rows], key=key) for key in ("standard_error", "prob")
        ],
        "action probabilities have the shape (",
    ),
    "no probabilities": (lambda path: with_meta(path, table=None), "no action probabilities are saved with the roll"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_compared_is_told_in_one_line(
    fault: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = FAULTS[fault]
    spoil(file)
    line = told(capsys, f"rollouts={file}")
    assert line.startswith(f"rollouts={file}: ")
    assert line.removeprefix(f"rollouts={file}: ").startswith(said)
    assert "; " in line or ": must be " in line, "and what to do about it"
    assert {path.name for path in file.parent.iterdir()} <= {file.name}, "nothing is written"


def test_what_stood_in_the_output_stays(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([*QUIET, f"rollouts={file}"])
    before = {path.name: path.read_bytes() for path in (file.parent / "found").iterdir()}
    cut(file)
    capsys.readouterr()
    told(capsys, f"rollouts={file}")
    assert {path.name: path.read_bytes() for path in (file.parent / "found").iterdir()} == before


def test_a_kept_rollout_of_snake_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file as a run on Snake writes it, not one that only says so."""
    data = small_lab("env=snake").data
    path = tmp_path / "snake.parquet"
    save_rollout(
        path,
        SavedRollout(
            batch=data.collect(0, 0),
            scenario=GameSettings.of(data.collector.make_game),
            sampling=data.sampling,
            table=None,
        ),
    )
    line = told(capsys, f"rollouts={path}", f"output={tmp_path}/found")
    assert line.startswith(f"rollouts={path}: game Snake has no oracle to hold credit against; save a rollout of Froz")
    assert [child.name for child in tmp_path.iterdir()] == ["snake.parquet"]


# Command lines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["credit=nosuch"], "credit=nosuch: no such option; there are: "),
        (["sampler=abs"], "sampler=abs: no such option; "),
        (["num_episodes=0"], "num_episodes=0: must be a whole number at least 1"),
        (["draws=0"], "draws=0: must be a whole number at least 2"),
        (["draws=8", "resamples=15"], "resamples=15: must be at least 2 for each of draws=8; give more, or draw less"),
        (["output=rollout.parquet"], "output=rollout.parquet: "),
        (["output=rollout.parquet/in"], "output=rollout.parquet/in: "),
        (["rule=rloo"], "rule=rloo: no such key; "),
        (["credit.=1"], "credit.=1: no such key; "),
        (["credit.rloo=1"], "credit.rloo=1: no key is named; give credit.rloo.<key>=…"),
        (["output=${nowhere}"], "output=${nowhere}: cannot be resolved ("),
        (["credit=['${nowhere}']"], "credit.0=${nowhere}: cannot be resolved ("),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_told_in_one_line(
    arguments: list[str], said: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = told(capsys, f"rollouts={file}", *arguments)
    assert line.startswith(said)
    assert "; " in line
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_all_may_stand_among_names(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([*QUIET, f"rollouts={file}", "credit=rloo,all", "sampler=null", "output=null"])
    assert "\n  gigpo " in capsys.readouterr().out


def test_too_few_resamples_are_fine_where_nothing_is_drawn(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([*QUIET, f"rollouts={file}", "sampler=null", "draws=8", "resamples=4", "output=null"])
    assert capsys.readouterr().err == ""


def test_intervals_over_no_resample_are_refused(played: Played) -> None:
    """Ten draws cannot share five resamples: the error over groups would silently be missing."""
    credit = with_outcomes(played.batch, RLOO()(played.batch))
    picks = draw_repeatedly(Uniform(num_episodes=5), credit, played.batch, 5, np.random.default_rng(0).spawn(10))
    with pytest.raises(ValueError, match="times_RG: 5 resamples for 10 draws; give at least 20, or none"):
        measure(played.yardstick, credit, resample_groups(6, 5, np.random.default_rng(0)), draws=picks)


def test_only_what_was_written_becomes_an_artifact(file: Path) -> None:
    """The output may be a folder with other things in it, the rollout itself among them."""
    uri = f"sqlite:///{file.parent}/mlflow.db"
    command.main([*QUIET, f"rollouts={file}", "output=.", "logger=mlflow", f"logger.tracking_uri={uri}"])
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("msgrpo").experiment_id])
    names = {Path(artifact.path).name for artifact in client.list_artifacts(run.info.run_id, "compare")}
    assert names == {"table.md", "table.csv", "fidelity.pdf", "fidelity.svg", "fidelity.png"}
