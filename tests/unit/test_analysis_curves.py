"""Runs → cells, on tables written out by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from msgrpo_lab.report.curves import (
    NONE,
    OVER_EPISODES,
    OVER_RUNS,
    OVER_SEEDS,
    curve,
    join,
    label_methods,
    last_values,
    panels,
    references,
    score_metric,
    summary,
)

SUCCESS = "eval/frozenlake/success_rate"


def make_runs(*rows, **params):
    """Runs from (env, sampler, seed) triples, started one after the other; `params`: column → values."""
    runs = pd.DataFrame(rows, columns=["env", "sampler", "seed"])
    runs["run_id"] = [f"r{place}" for place in range(len(rows))]
    runs["name"] = runs["run_id"]
    runs["start"] = pd.date_range("2025-01-01", periods=len(rows), freq="min", tz="UTC")
    for tag in ("credit", "model", "prompt"):
        runs[tag] = params.pop(tag, "same")
    for column, values in params.items():
        runs[f"param.{column.replace('__', '.')}"] = values
    return runs


def make_points(runs, values):
    """Points from {metric: {run: {step: value}}}."""
    rows = [
        (run_id, metric, step, value)
        for metric, by_run in values.items()
        for run_id, points in by_run.items()
        for step, value in points.items()
    ]
    return join(label_methods(runs), pd.DataFrame(rows, columns=["run_id", "metric", "step", "value"]))


TWO = make_runs(("frozenlake", "uniform", "0"), ("frozenlake", "uniform", "1"))
ONE = make_runs(("frozenlake", "uniform", "0"))


def test_band_is_the_sample_deviation_over_seeds():
    # 0.2 and 0.6: mean 0.4, sample std = √(2·0.2²/1) = 0.282843
    frame = curve(make_points(TWO, {SUCCESS: {"r0": {5: 0.2}, "r1": {5: 0.6}}}), "frozenlake", SUCCESS)
    (row,) = frame.to_dict("records")
    assert row["mean"] == pytest.approx(0.4)
    assert row["low"] == pytest.approx(0.4 - 0.282843, abs=1e-6)
    assert row["high"] == pytest.approx(0.4 + 0.282843, abs=1e-6)
    assert (row["seeds"], row["band"]) == (2, OVER_SEEDS)


def test_one_seed_shows_the_interval_over_episodes_and_says_so():
    values = {SUCCESS: {"r0": {5: 0.5}}, f"{SUCCESS}_low": {"r0": {5: 0.4}}, f"{SUCCESS}_high": {"r0": {5: 0.7}}}
    (row,) = curve(make_points(ONE, values), "frozenlake", SUCCESS).to_dict("records")
    assert (row["low"], row["high"], row["band"]) == (0.4, 0.7, OVER_EPISODES)


def test_one_seed_without_an_interval_has_none():
    (row,) = curve(make_points(ONE, {SUCCESS: {"r0": {5: 0.5}}}), "frozenlake", SUCCESS).to_dict("records")
    assert math.isnan(row["low"])
    assert math.isnan(row["high"])
    assert row["band"] == NONE


def test_several_seeds_never_use_an_interval_over_episodes():
    values = {
        SUCCESS: {"r0": {5: 0.5}, "r1": {5: 0.5}},
        f"{SUCCESS}_low": {"r0": {5: 0.1}, "r1": {5: 0.1}},
        f"{SUCCESS}_high": {"r0": {5: 0.9}, "r1": {5: 0.9}},
    }
    (row,) = curve(make_points(TWO, values), "frozenlake", SUCCESS).to_dict("records")
    assert (row["low"], row["high"]) == (0.5, 0.5)


def test_only_steps_that_all_seeds_share_are_averaged(caplog):
    points = make_points(TWO, {SUCCESS: {"r0": {0: 0.0, 5: 0.2, 10: 0.9}, "r1": {0: 0.2, 5: 0.4}}})
    frame = curve(points, "frozenlake", SUCCESS)
    assert list(frame["step"]) == [0, 5]
    assert list(frame["mean"]) == pytest.approx([0.1, 0.3])
    assert "shown at the 2 steps shared by all seeds" in caplog.text


def test_a_seed_without_the_metric_is_left_out_and_told(caplog):
    points = make_points(TWO, {SUCCESS: {"r0": {0: 0.25}}, "train/loss": {"r1": {0: 1.0}}})
    frame = curve(points, "frozenlake", SUCCESS)
    assert list(frame["mean"]) == [0.25]
    assert list(frame["seeds"]) == [1]
    assert "1 of the runs logged no" in caplog.text


def test_a_value_that_is_not_a_number_is_not_averaged_away():
    frame = curve(make_points(TWO, {SUCCESS: {"r0": {5: math.nan}, "r1": {5: 0.6}}}), "frozenlake", SUCCESS)
    assert math.isnan(frame["mean"].iloc[0])


def test_a_metric_nobody_logged_gives_no_line():
    frame = curve(make_points(ONE, {SUCCESS: {"r0": {0: 0.1}}}), "frozenlake", "train/nosuch")
    assert frame.empty
    assert "band" in frame.columns


def test_methods_come_in_a_fixed_order():
    runs = make_runs(
        ("snake", "zeta", "0"), ("snake", "abs_adv", "0"), ("snake", "uniform", "0"), ("frozenlake", "zeta", "0")
    )
    labelled = label_methods(runs)
    assert list(labelled["env"]) == ["frozenlake", "snake", "snake", "snake"]
    assert list(labelled["method"]) == ["zeta", "uniform", "abs_adv", "zeta"]


def test_a_seed_that_occurs_twice_counts_once(caplog):
    runs = make_runs(("snake", "uniform", "0"), ("snake", "uniform", "0"), ("snake", "uniform", "1"))
    assert list(label_methods(runs)["run_id"]) == ["r1", "r2"]
    assert "job r0 (snake, uniform) has seed 0, as a newer job does" in caplog.text


def test_runs_without_a_seed_are_all_kept():
    assert len(label_methods(make_runs(("snake", "uniform", ""), ("snake", "uniform", "")))) == 2


def test_two_settings_are_never_averaged_as_seeds():
    runs = make_runs(("snake", "uniform", "0"), ("snake", "uniform", "0"), optim__lr=["1e-4", "3e-4"])
    assert list(label_methods(runs)["method"]) == ["uniform, optim.lr=1e-4", "uniform, optim.lr=3e-4"]


@pytest.mark.parametrize("tag", ["credit", "model", "prompt"])
def test_a_tag_that_differs_is_part_of_the_method(tag):
    runs = make_runs(("snake", "uniform", "0"), ("snake", "uniform", "0"), **{tag: ["one", "two"]})
    assert list(label_methods(runs)["method"]) == ["uniform, one", "uniform, two"]


@pytest.mark.parametrize(
    "key",
    [
        "seed",
        "data__seed",
        "paths__outputs",
        "logger__folder",
        "checkpoint__every",
        "trainer__default_root_dir",
        "ckpt_path",
        "resume",
    ],
)
def test_what_tells_runs_apart_is_no_setting(key):
    runs = make_runs(("snake", "uniform", "0"), ("snake", "uniform", "1"), **{key: ["0", "1"]})
    assert list(label_methods(runs)["method"]) == ["uniform", "uniform"]


@pytest.mark.parametrize("key", ["model__path", "optim__lr", "rollout__group_size", "env__horizon", "seeding"])
def test_what_changes_the_run_is_a_setting(key):
    runs = make_runs(("snake", "uniform", "0"), ("snake", "uniform", "1"), **{key: ["a", "b"]})
    name = key.replace("__", ".")
    assert list(label_methods(runs)["method"]) == [f"uniform, {name}=a", f"uniform, {name}=b"]


def test_a_param_that_differs_between_environments_only_is_no_setting():
    runs = make_runs(("snake", "uniform", "0"), ("frozenlake", "uniform", "0"), env__horizon=["20", "8"])
    assert set(label_methods(runs)["method"]) == {"uniform"}


def test_panels_put_the_own_scenario_first():
    values = {f"eval/{name}/return_mean": {"r0": {0: 1.0}} for name in ("frozenlake_big", "snake_20", "snake")}
    points = make_points(make_runs(("snake", "uniform", "0")), values)
    assert panels(points) == [("snake", "snake"), ("snake", "frozenlake_big"), ("snake", "snake_20")]


@pytest.mark.parametrize(
    ("scenario", "metric"),
    [("frozenlake", "success_rate"), ("frozenlake_slippery", "success_rate"), ("snake_20", "return_mean")],
)
def test_each_scenario_has_its_score(scenario, metric):
    assert score_metric(scenario) == metric


def test_references_are_read_per_player_lowest_first():
    names = {"optimal": 1.0, "random": 0.01, "hole_avoiding": 0.86}
    values = {f"reference/frozenlake/{name}/success_rate": {"r0": {0: value}} for name, value in names.items()}
    values["reference/frozenlake/random/return_mean"] = {"r0": {0: 9.0}}
    values["reference/snake/random/success_rate"] = {"r0": {0: 8.0}}
    table = references(make_points(ONE, values), "frozenlake", "frozenlake", "success_rate")
    assert list(zip(table["player"], table["value"], strict=True)) == [
        ("random", 0.01),
        ("hole_avoiding", 0.86),
        ("optimal", 1.0),
    ]


def test_references_that_differ_between_jobs_are_averaged_and_told(caplog):
    values = {"reference/frozenlake/random/success_rate": {"r0": {0: 0.0}, "r1": {0: 0.1}}}
    table = references(make_points(TWO, values), "frozenlake", "frozenlake", "success_rate")
    assert list(table["value"]) == pytest.approx([0.05])
    assert "reference random differs between jobs (0 to 0.1)" in caplog.text


def test_summary_of_several_seeds():
    values = {
        SUCCESS: {"r0": {0: 0.0, 5: 0.4}, "r1": {0: 0.2, 5: 0.8}},
        "eval/frozenlake/normalised_score": {"r0": {0: 0.0, 5: 0.3}, "r1": {0: 0.1, 5: 0.7}},
        "train/env_steps": {"r0": {1: 10.0, 5: 50.0}, "r1": {1: 12.0, 5: 70.0}},
        "train/wall_s": {"r0": {1: 1.0, 5: 5.0}, "r1": {1: 1.0, 5: 6.0}},
    }
    (row,) = summary(make_points(TWO, values)).to_dict("records")
    assert (row["mode"], row["seeds"], row["first_step"], row["last_step"]) == ("sampled", 2, 0, 5)
    assert (row["start"], row["end"]) == pytest.approx((0.1, 0.6))
    assert (row["normalised"], row["env_steps"], row["wall_s"]) == pytest.approx((0.5, 60.0, 5.5))
    # two runs: the bootstrapped means are 0.4, 0.6, 0.8, so the 95 % interval is their whole range
    assert (row["end_low"], row["end_high"]) == pytest.approx((0.4, 0.8))
    assert row["interval"] == OVER_RUNS


def test_summary_of_one_seed_keeps_sampled_and_greedy_apart():
    greedy = "eval/frozenlake/greedy_success_rate"
    values = {
        SUCCESS: {"r0": {0: 0.1, 5: 0.5}},
        f"{SUCCESS}_low": {"r0": {0: 0.0, 5: 0.4}},
        f"{SUCCESS}_high": {"r0": {0: 0.2, 5: 0.6}},
        greedy: {"r0": {0: 0.2, 5: 0.7}},
    }
    sampled, best = summary(make_points(ONE, values)).to_dict("records")
    assert (sampled["end"], sampled["end_low"], sampled["end_high"]) == (0.5, 0.4, 0.6)
    assert (sampled["start_low"], sampled["start_high"], sampled["interval"]) == (0.0, 0.2, OVER_EPISODES)
    assert (best["mode"], best["end"], best["interval"]) == ("greedy", 0.7, NONE)
    assert math.isnan(best["end_low"])
    assert math.isnan(best["wall_s"])


def test_last_values_are_those_of_the_last_shared_step():
    points = make_points(TWO, {SUCCESS: {"r0": {0: 0.1, 5: 0.2, 9: 0.9}, "r1": {0: 0.3, 5: 0.4}}})
    last = last_values(points, "frozenlake", "uniform", SUCCESS)
    assert dict(zip(last["seed"], last["value"], strict=True)) == {"0": 0.2, "1": 0.4}
    assert set(last["step"]) == {5}
