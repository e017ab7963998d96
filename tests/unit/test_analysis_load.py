"""MLflow → tables: the right jobs, the right numbers, and one line when there is nothing to read."""

from __future__ import annotations

import sqlite3

import numpy as np
import pandas as pd
import pytest
from analysis_synthetic import EVAL_EVERY, GRID, SHORT, UPDATES, Job, curves, filled

from msgrpo_lab.report.sweep import JOB_TAGS, TrackingError, keep_finished, load_metrics, load_runs


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return filled(tmp_path_factory.getbasetemp())


def test_latest_is_the_newest_finished_sweep(store):
    runs = load_runs(store.uri)
    assert set(runs["sweep"]) == {store.grid}
    assert len(runs) == len(GRID)


def test_a_newer_sweep_that_did_not_finish_is_told(store, caplog):
    load_runs(store.uri)
    assert f"the newest sweep, {store.running}, is RUNNING" in caplog.text


def test_a_run_has_its_tags_status_and_duration(store):
    runs = load_runs(store.uri, sweep=store.grid)
    assert list(runs["env"]) == [job.env for job in GRID]
    assert list(runs["sampler"]) == [job.sampler for job in GRID]
    assert set(runs["status"]) == {"FINISHED"}
    assert list(runs["duration_s"]) == [50.0] * len(GRID)
    assert runs["start"].is_monotonic_increasing
    assert set(JOB_TAGS) <= set(runs.columns)


def test_only_params_that_differ_become_columns(store):
    runs = load_runs(store.uri, sweep=store.grid)
    assert [column for column in runs if column.startswith("param.")] == ["param.env.name", "param.sampler.name"]


def test_several_sweeps_are_put_together_once_each(store):
    runs = load_runs(store.uri, sweep=f"{store.seeds}, {store.grid},{store.seeds}")
    assert list(dict.fromkeys(runs["sweep"])) == [store.seeds, store.grid]
    assert len(runs) == 8 + len(GRID)
    assert runs["run_id"].is_unique


def test_none_means_jobs_without_a_parent(store):
    runs = load_runs(store.uri, sweep="none")
    assert list(runs["run_id"]) == [store.single]
    assert list(runs["sweep"]) == [""]


def test_a_running_sweep_can_be_named(store):
    assert set(load_runs(store.uri, sweep=store.running)["sweep"]) == {store.running}


def test_unfinished_jobs_are_left_out_and_named(store, caplog):
    runs = load_runs(store.uri, sweep=store.seeds)
    kept = keep_finished(runs)
    assert len(runs) == 8
    assert sorted(kept["seed"]) == ["0", "0", "1", "1", "2", "2"]
    assert "seed 3) is FAILED" in caplog.text
    assert "seed 4) is RUNNING" in caplog.text
    assert runs.loc[runs["status"] == "RUNNING", "duration_s"].isna().all()


@pytest.mark.parametrize("tag", ["env", "sampler"])
def test_a_job_without_a_needed_tag_is_left_out_and_named(store, caplog, tag):
    runs = load_runs(store.uri, sweep=store.grid)
    runs.loc[1, tag] = ""
    assert len(keep_finished(runs)) == len(GRID) - 1
    assert f"has no tag '{tag}'" in caplog.text


def test_every_number_comes_back(store):
    runs = load_runs(store.uri, sweep=store.grid)
    metrics = load_metrics(store.uri, list(runs["run_id"]))
    for run_id, job in zip(runs["run_id"], GRID, strict=True):
        mine = metrics[metrics["run_id"] == run_id]
        logged = curves(job)
        assert set(mine["metric"]) == set(logged)
        for name, points in logged.items():
            read = mine[mine["metric"] == name]
            assert dict(zip(read["step"], read["value"], strict=True)) == points
    assert list(metrics.columns) == ["run_id", "metric", "step", "value", "time"]


def test_numbers_are_sorted_and_unique(store):
    metrics = load_metrics(store.uri, [store.single])
    keys = metrics[["run_id", "metric", "step"]]
    assert not keys.duplicated().any()
    pd.testing.assert_frame_equal(keys, keys.sort_values(["run_id", "metric", "step"]))


def test_the_later_of_two_values_of_a_step_wins(store):
    metrics = load_metrics(store.uri, [store.single])
    loss = metrics[metrics["metric"] == "train/loss"].set_index("step")["value"]
    assert loss[3] == 4.0


def test_infinity_survives_the_database(store):
    metrics = load_metrics(store.uri, [store.single])
    loss = metrics[metrics["metric"] == "train/loss"].set_index("step")["value"]
    assert loss[4] == -np.inf


def test_system_metrics_are_not_read_unless_asked_for(store):
    assert not load_metrics(store.uri, [store.single])["metric"].str.startswith("system/").any()
    assert set(load_metrics(store.uri, [store.single], prefixes=["system/"])["metric"]) == {"system/cpu"}


def test_steps_are_the_updates(store):
    metrics = load_metrics(store.uri, [store.single])
    steps = {name: list(cell["step"]) for name, cell in metrics.groupby("metric")}
    assert steps["train/return_mean"] == list(range(SHORT))
    assert steps["eval/frozenlake/success_rate"] == list(range(0, SHORT + 1, EVAL_EVERY))
    assert UPDATES % EVAL_EVERY == 0


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_database_says_how_to_make_one_and_makes_none(tmp_path):
    uri = f"sqlite:///{tmp_path / 'absent.db'}"
    with pytest.raises(TrackingError, match="make sweep") as caught:
        load_runs(uri)
    assert str(tmp_path / "absent.db") in one_line(caught)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"this is not a database, although it is long enough to be one" * 20])
def test_another_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "odd.db"
    path.write_bytes(content)
    with pytest.raises(TrackingError, match=r"odd\.db") as caught:
        load_runs(f"sqlite:///{path}")
    one_line(caught)
    assert path.read_bytes() == content


def test_another_programs_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table things (name text)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(TrackingError, match="no MLflow tables"):
        load_runs(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_an_address_that_mlflow_refuses_is_one_line():
    with pytest.raises(TrackingError, match="tracking uri 'nosuch://x'") as caught:
        load_runs("nosuch://x")
    one_line(caught)


@pytest.mark.parametrize(
    ("experiment", "sweep", "words"),
    [
        ("nosuch", "latest", "experiment 'nosuch' is not in"),
        ("bare", "latest", "has no sweep; make one with `make sweep`"),
        ("bare", "none", "no jobs at all"),
        ("only-running", "latest", "the newest is RUNNING: draw its finished jobs with --sweep"),
        ("msgrpo", "deadbeef", "sweep 'deadbeef' is not in experiment 'msgrpo'; newest sweeps: "),
        ("msgrpo", " , ", "names no run"),
    ],
)
def test_nothing_to_draw_is_one_line(store, experiment, sweep, words):
    with pytest.raises(TrackingError, match=words) as caught:
        load_runs(store.uri, experiment, sweep)
    one_line(caught)


def test_a_sweep_without_a_finished_job_is_one_line(store):
    with pytest.raises(TrackingError, match=r"no finished jobs \(FAILED\)") as caught:
        load_runs(store.uri, sweep=store.empty_sweep)
    one_line(caught)


def test_a_job_run_is_no_sweep(store):
    with pytest.raises(TrackingError, match="is not in experiment"):
        load_runs(store.uri, sweep=store.single)


def test_an_unknown_run_has_no_metrics(store):
    with pytest.raises(TrackingError, match="deadbeef"):
        load_metrics(store.uri, ["deadbeef"])


def test_synthetic_jobs_are_deterministic():
    assert curves(Job()) == curves(Job())
    assert curves(Job()) != curves(Job(seed=1))
