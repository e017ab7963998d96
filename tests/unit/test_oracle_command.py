"""`python -m msgrpo_lab.oracle`: how hard a scenario is, and one line for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msgrpo_lab import difficulty as command
from msgrpo_lab.oracle.difficulty import bootstrap_mean, difficulty, map_rows
from msgrpo_lab.oracle.frozen_lake import optimal_success, random_success
from msgrpo_lab.seeding import generator, held_out_seeds
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.snake import Snake

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "msgrpo_lab.oracle", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run the command in, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["oracle"])
    return tmp_path


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


# What it says -------------------------------------------------------------------------------------------------------


def test_the_file_holds_each_map_with_its_exact_probabilities(tmp_path: Path) -> None:
    done = run(tmp_path, "env=frozenlake_slippery", "num_maps=12", "output=found.json", "env.horizon=9")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"], "nothing else is written"
    found = read(tmp_path / "found.json")
    assert (found["schema"], found["env"], found["num_maps"], found["exact"]) == (
        "msgrpo_lab.oracle/1",
        "frozenlake_slippery",
        12,
        True,
    )
    assert found["settings"]["horizon"] == found["horizon"] == 9
    assert [one["seed"] for one in found["maps"]] == held_out_seeds(12)
    game = FrozenLake(frozen_probability=0.9, slippery=True, horizon=9)
    for one in found["maps"]:
        game.reset(seed=one["seed"])
        assert one["map"] == list(game.lake.rows)
        assert {letter for row in one["map"] for letter in row} <= set("SFHG")
        assert (one["optimal"], one["random"]) == (optimal_success(game), random_success(game))
    for player in ("optimal", "random"):
        mean = found["mean"][player]["success"]
        assert mean["value"] == pytest.approx(np.mean([one[player] for one in found["maps"]]), abs=1e-12)
        assert mean["low"] < mean["value"] < mean["high"]
        assert f"{mean['value']:.3f}  [{mean['low']:.3f}, {mean['high']:.3f}]" in done.stdout


@pytest.mark.parametrize(
    ("env", "optimal", "random"),
    [("frozenlake", 1.0, 0.007), ("frozenlake_slippery", 0.361, 0.060), ("frozenlake_big", 0.038, 0.002)],
)
def test_the_known_difficulty_lies_within_reach_of_the_means(
    env: str, optimal: float, random: float, here: Path
) -> None:
    """Known from 200 other maps; fifty maps scatter about them, within a quarter for the small numbers."""
    command.main([f"env={env}", "output=found.json"])
    mean = read(here / "found.json")["mean"]
    assert mean["optimal"]["success"]["value"] == pytest.approx(optimal, rel=0.25)
    assert mean["random"]["success"]["value"] == pytest.approx(random, rel=0.35)


def test_snakes_optimum_is_not_claimed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["env=snake_20", "num_maps=4", "output=found.json", "seed=0"])
    said = capsys.readouterr().out
    assert "optimal: unknown for Snake; the search player is a reference, not the optimum" in said
    found = read(here / "found.json")
    assert not found["exact"]
    assert [one["optimal"] for one in found["maps"]] == [None] * 4
    for one in found["maps"]:
        assert len(one["map"]) == 10
        assert {len(row) for row in one["map"]} == {10}
        assert "".join(one["map"]).count("A") == 5
        assert one["scores"]["search"]["return_mean"] > one["scores"]["random"]["return_mean"]
        assert one["scores"]["search"]["standard_error"] > 0


def test_without_an_output_the_means_are_printed_and_nothing_is_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(["num_maps=1"])
    said = capsys.readouterr().out
    assert "1 held-out maps (seeds 10000000 to 10000000), exact" in said
    assert "optimal  success   1.000\n" in said, "one map has no interval"
    assert list(here.iterdir()) == []


def test_a_seed_moves_simulations_and_not_the_maps() -> None:
    make = lambda: Snake(size=6, num_apples=3, horizon=6)  # noqa: E731
    one, same, other = (difficulty(make, 3, generator(seed, "reference"), episodes_per_map=5) for seed in (0, 0, 1))
    assert one.maps == same.maps
    assert one.means == same.means
    assert [m.rows for m in one.maps] == [m.rows for m in other.maps]
    assert one.maps != other.maps


def test_rows_of_a_snake_board_by_hand() -> None:
    game = Snake(size=4, num_apples=1, num_bananas=1)
    game.reset(seed=0)
    rows = map_rows(game)
    assert (len(rows), {len(row) for row in rows}) == (4, {4})
    for letter, cells in (("P", game.board.player), ("S", game.board.others[0]), ("A", game.board.apples)):
        assert rows[cells[0][0]][cells[0][1]] == letter


def test_intervals_of_means() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=200)
    mean, low, high = bootstrap_mean(values, rng)
    half = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == (pytest.approx(mean - half, abs=0.2 * half), pytest.approx(mean + half, abs=0.2 * half))
    assert bootstrap_mean(np.ones(5), rng) == (1, 1, 1)
    assert np.isnan(bootstrap_mean(np.ones(1), rng)[1:]).all()


def test_one_map_has_no_interval_in_the_file() -> None:
    found = difficulty(FrozenLake, 1, generator(0, "reference")).as_json(env="x", settings={}, seed=0)
    assert found["mean"]["optimal"]["success"] == {"value": 1.0, "low": None, "high": None}
    json.dumps(found, allow_nan=False)


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["env=frozen"], "env=frozen: no such option; did you mean 'frozenlake'?"),
        (["num_maps=0"], "num_maps=0: must be a whole number at least 1; give for example num_maps=50"),
        (["num_maps=abc"], "num_maps=abc: must be a whole number at least 1; give for example num_maps=50"),
        (["episodes_per_map=1"], "episodes_per_map=1: must be a whole number at least 2"),
        (["output=nowhere/found.json"], "output=nowhere/found.json: there is no folder"),
        (["output=."], "output=.: {folder} is a folder; give a file"),
        (["output="], "output=: must not be empty; give a file"),
        (["output=/dev/null"], "output=/dev/null: /dev/null is no plain file"),
        (["output=3"], "output=3: must be text or null"),
        (["env.horizon=0"], "env.horizon=0: must be at least 1"),
        (["seed=-1"], "seed=-1: must be a whole number at least 0"),
        (["maps=3"], "maps=3: no such key; did you mean 'num_maps'?"),
        (["+maps=3"], "maps=3: no such key; did you mean 'num_maps'?"),
        (["-m", "env=snake,frozenlake"], "command line: one scenario a call; leave out -m"),
        (["hydra.mode=MULTIRUN"], "command line: one scenario a call; leave out -m"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_one_line(
    arguments: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"msgrpo_lab: {said.format(folder=here)}")
    assert printed.out == ""
    assert list(here.iterdir()) == []


def test_the_real_command_tells_a_mistake_the_same_way(tmp_path: Path) -> None:
    done = run(tmp_path, "num_maps=abc", "output=found.json")
    assert done.returncode == 2
    assert done.stderr.startswith("msgrpo_lab: num_maps=abc: must be a whole number at least 1")
    assert len(done.stderr.splitlines()) == 1
    assert (done.stdout, list(tmp_path.iterdir())) == ("", [])


def test_every_mistake_is_told() -> None:
    found = command.check({"num_maps": 0, "episodes_per_map": True, "output": "", "seed": 0, "env": {}, "other": 1})
    assert [mistake.key for mistake in found] == ["other", "num_maps", "episodes_per_map", "output"]


def test_mistakes_of_the_scenario_and_of_the_command_are_told_together(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["env.horizon=0", "num_maps=0", "output="])
    keys = [line.removeprefix("msgrpo_lab: ").partition("=")[0] for line in capsys.readouterr().err.splitlines()]
    assert keys == ["env.horizon", "num_maps", "output"]


def test_a_write_that_fails_leaves_what_stood_there(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text("before")
    with pytest.raises(ValueError, match="not JSON compliant"):
        command.write_json(path, {"value": float("nan")})
    assert path.read_text() == "before"
    assert [child.name for child in tmp_path.iterdir()] == ["found.json"]
    command.write_json(path, {"value": 1})
    assert read(path) == {"value": 1}
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_full_disk_is_told_in_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_json", full)
    with pytest.raises(SystemExit) as stopped:
        command.main(["num_maps=2", "output=found.json"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("msgrpo_lab: output=found.json: cannot be written (No space left")
    assert list(here.iterdir()) == []
