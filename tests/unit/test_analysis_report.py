"""The Markdown table: its numbers are the inputs, and what is unknown is a dash."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from analysis.table import (
    duration,
    markdown_table,
    number,
    reference_values,
    render,
    with_interval,
    write_table,
)
from msgrpo_lab.intervals import NO_INTERVAL, Interval
from msgrpo_lab.report.curves import join, label_methods


def make_points(jobs, values):
    """Points from (env, sampler, seed) triples and {metric: [a value a job]} at step 10, or {step: value} each."""
    runs = pd.DataFrame(jobs, columns=["env", "sampler", "seed"])
    runs["run_id"] = runs["name"] = [f"r{place}" for place in range(len(jobs))]
    runs["start"] = pd.date_range("2025-01-01", periods=len(jobs), freq="min", tz="UTC")
    runs[["credit", "model", "prompt"]] = ""
    rows = [
        (f"r{place}", metric, step, number_)
        for metric, column in values.items()
        for place, value in enumerate(column)
        if value is not None
        for step, number_ in (value if isinstance(value, dict) else {10: value}).items()
    ]
    return join(label_methods(runs), pd.DataFrame(rows, columns=["run_id", "metric", "step", "value"]))


ONE = make_points(
    [("frozenlake", "uniform", "0")],
    {
        "eval/frozenlake/success_rate": [{0: 0.0134, 40: 0.8404}],
        "eval/frozenlake/success_rate_low": [{0: 0.0, 40: 0.78}],
        "eval/frozenlake/success_rate_high": [{0: 0.04, 40: 0.8856}],
        "eval/frozenlake/greedy_success_rate": [{0: 0.0, 40: 0.82}],
        "eval/frozenlake/normalised_score": [{0: 0.01, 40: 0.8391}],
        "train/env_steps": [{1: 14000.0, 40: 560000.0}],
        "train/wall_s": [{1: 5.0, 40: 204.6}],
        "reference/frozenlake/random/success_rate": [{0: 0.0072}],
        "reference/frozenlake/random/return_mean": [{0: 0.0072}],
        "reference/frozenlake/optimal/success_rate": [{0: 1.0}],
    },
)


def row_of(text, first):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_holds_the_inputs():
    assert row_of(render(ONE, "x", []), "uniform") == [
        "uniform",
        "1",
        "40",
        "0.013 [0.000, 0.040] → 0.840 [0.780, 0.886]",
        "0.000 → 0.820",
        "0.839",
        "–",
        "560 000",
        "3 min 25 s",
    ]


def test_reference_rows_hold_the_inputs_and_a_dash_for_the_unknown():
    text = render(ONE, "x", [])
    assert row_of(text, "random") == ["random", "0.007", "0.007"]
    assert row_of(text, "optimal") == ["optimal", "–", "1.000"]


def test_one_seed_is_said_to_have_no_interval_over_seeds():
    text = render(ONE, "x", [])
    assert "with one seed there is no interval over seeds" in text
    assert "bootstrap intervals over seeds" not in text


def test_one_environment_has_no_comparison_over_environments():
    assert "## Over" not in render(ONE, "x", [])


def test_source_and_remarks_are_shown():
    text = render(ONE, "experiment `msgrpo`", ["left out: job r9"])
    assert "1 finished job; experiment `msgrpo`." in text
    assert text.endswith("## Remarks\n\n- left out: job r9\n")


JOBS = [(env, sampler, seed) for env in ("snake", "frozenlake") for sampler in ("uniform", "abs_adv") for seed in "012"]


def over_environments(jobs, normalised):
    values = {}
    for env in ("snake", "frozenlake"):
        inside = [value if job[0] == env else None for job, value in zip(jobs, normalised, strict=True)]
        for name in ("return_mean", "success_rate", "normalised_score"):
            values[f"eval/{env}/{name}"] = inside
    return render(make_points(jobs, values), "x", [])


def test_over_environments_iqm_and_improvement():
    # uniform: snake 0.1 0.2 0.3, lake 0.6 0.7 0.8: 6 scores, one dropped at each end: (0.2 + 0.3 + 0.6 + 0.7)/4 = 0.45.
    # abs_adv: snake 0.2 0.3 0.4, lake 0.9 0.9 0.9: (0.3 + 0.4 + 0.9 + 0.9)/4 = 0.625.
    # P: snake: 0.2 beats one and ties one (1.5), 0.3 beats two and ties one (2.5), 0.4 all (3): 7/9; lake 9/9: 8/9.
    normalised = [0.1, 0.2, 0.3, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9]
    section = over_environments(JOBS, normalised).split("## Over 2 environments")[1]
    uniform, aaw = row_of(section, "uniform"), row_of(section, "abs_adv (AAW)")
    assert uniform[1] == "3, 3"
    assert uniform[2].startswith("0.450 [")
    assert uniform[3] == "–"
    assert aaw[2].startswith("0.625 [")
    assert aaw[3] == "0.89"


def test_over_environments_with_one_seed_has_no_interval():
    jobs = [(env, sampler, "0") for env in ("snake", "frozenlake") for sampler in ("uniform", "abs_adv")]
    section = over_environments(jobs, [0.1, 0.2, 0.7, 0.8]).split("## Over 2 environments")[1]
    # two scores, none dropped: (0.1 + 0.7)/2 and (0.2 + 0.8)/2
    assert row_of(section, "uniform")[2] == "0.400"
    assert row_of(section, "abs_adv (AAW)")[2] == "0.500"
    assert "with a single seed no interval exists" in section


def test_reference_values_are_worst_first():
    table = reference_values(ONE, "frozenlake", "frozenlake")
    assert list(table.index) == ["random", "optimal"]
    assert math.isnan(table.loc["optimal", "return_mean"])


def test_no_held_out_scores_is_said():
    points = make_points([("snake", "uniform", "0")], {"train/return_mean": [0.5]})
    assert "No job logged a held-out score." in render(points, "x", [])


def test_table_files_hold_the_same_cells(tmp_path):
    markdown, table = write_table(ONE, "x", [], tmp_path)
    assert markdown.read_text(encoding="utf-8") == render(ONE, "x", [])
    read = pd.read_csv(table).set_index("mode")
    assert read.loc["sampled", "end"] == 0.8404
    assert read.loc["greedy", "end"] == 0.82


@pytest.mark.parametrize(
    ("value", "text"), [(0.1236, "0.124"), (-0.5, "−0.500"), (math.nan, "–"), (math.inf, "–"), (0.0, "0.000")]
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("interval", "text"),
    [(Interval(0.4, 0.61), "0.500 [0.400, 0.610]"), (NO_INTERVAL, "0.500"), (Interval(0.4, math.nan), "0.500")],
)
def test_numbers_with_an_interval(interval, text):
    assert with_interval(0.5, interval) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (725.0, "12 min 05 s"),
        (7380.0, "2 h 03 min"),
        (math.nan, "–"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_bar_in_a_cell_does_not_end_it():
    assert markdown_table(["a", "b"], [["x|y", "z"]]) == "| a | b |\n| --- | --- |\n| x\\|y | z |"
