"""Evaluation runs → the transfer matrix: which are taken, what a cell says, and what the figure shows."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from analysis_synthetic import SHORT, Job, Store
from mlflow.entities import Metric

from analysis.evaluations import COLUMNS, as_references, load_evaluations, transfer
from analysis.figures import learning_curves, row_name, transfer_matrix
from analysis.plots import main
from analysis.sheet import paper_style
from msgrpo_lab.report.sweep import TrackingError


def scores_of(*rows):
    """A table as `load_evaluations` gives it, from dictionaries that change the defaults."""
    usual = {
        "policy": "run",
        "policy.kind": "run",
        "trained_on": "snake",
        "model": "tiny",
        "sampler": "uniform",
        "credit": "episode_return",
        "seed": "0",
        "scenario": "snake",
        "mode": "sampled",
        "score": "normalised_score",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "source_run": "",
        "start": pd.Timestamp("2025-01-01", tz="UTC"),
    }
    filled = [{**usual, "run_id": f"e{place}", "evaluations": "p", **row} for place, row in enumerate(rows)]
    return pd.DataFrame(filled, columns=list(COLUMNS))


RANDOM = {"policy": "random", "policy.kind": "player", "trained_on": "", "model": "", "sampler": "", "value": 0.0}
BASE = {"policy": "tiny", "policy.kind": "base", "trained_on": "", "sampler": "", "value": 0.1}


def test_a_cell_is_the_mean_over_training_runs():
    # runs 0.2 and 0.6: mean 0.4; resampled means are 0.2, 0.4, 0.6, so the 95 % percentile interval is [0.2, 0.6]
    (cell,) = transfer(scores_of({"value": 0.2, "seed": "0"}, {"value": 0.6, "seed": "1"})).to_dict("records")
    assert (cell["runs"], cell["value"]) == (2, pytest.approx(0.4))
    assert (cell["low"], cell["high"], cell["interval"]) == (0.2, 0.6, "95 % over seeds")


def test_a_single_run_has_the_interval_over_episodes():
    (cell,) = transfer(scores_of({})).to_dict("records")
    assert (cell["runs"], cell["low"], cell["high"], cell["interval"]) == (1, 0.4, 0.6, "95 % over episodes")


def test_rows_begin_with_what_was_not_trained_and_follow_the_scenarios():
    table = transfer(
        scores_of(
            {"trained_on": "snake", "sampler": "abs_adv"},
            {"trained_on": "snake"},
            {"trained_on": "frozenlake"},
            BASE,
            {**RANDOM, "policy": "optimal"},
            RANDOM,
            {**RANDOM, "scenario": "frozenlake"},
        )
    )
    rows = list(dict.fromkeys(zip(table["kind"], table["trained_on"], table["method"], strict=True)))
    assert rows == [
        ("player", "", "random"),
        ("player", "", "upper"),
        ("base", "", "tiny"),
        ("trained", "frozenlake", "uniform"),
        ("trained", "snake", "uniform"),
        ("trained", "snake", "abs_adv"),
    ]
    assert list(table["scenario"][:2]) == ["frozenlake", "snake"]


def test_the_upper_ends_of_the_scale_share_a_row_unless_a_scenario_has_both():
    lake, snake = {**RANDOM, "policy": "optimal", "scenario": "frozenlake"}, {**RANDOM, "policy": "search"}
    assert list(transfer(scores_of(lake, snake))["method"]) == ["upper", "upper"]
    both = transfer(scores_of(lake, {**snake, "scenario": "frozenlake"}))
    assert list(both["method"]) == ["search", "optimal"]


def test_models_and_rules_are_told_apart_only_where_they_differ():
    table = transfer(scores_of({"credit": "rloo"}, {"credit": "episode_return"}))
    assert sorted(table["method"]) == ["uniform, episode_return", "uniform, rloo"]
    assert list(transfer(scores_of({"seed": "0"}, {"seed": "1"}))["method"]) == ["uniform"]


def test_greedy_and_other_scores_stay_out():
    table = transfer(scores_of({}, {"mode": "greedy", "value": 0.9}, {"score": "return_mean", "value": 3.0}))
    assert list(table["value"]) == [0.5]
    assert list(transfer(scores_of({"mode": "greedy", "value": 0.9}), "greedy")["value"]) == [0.9]


def test_an_adapter_of_unknown_origin_keeps_its_name():
    (cell,) = transfer(scores_of({"policy": "mine", "policy.kind": "adapter", "sampler": ""})).to_dict("records")
    assert cell["method"] == "mine"


def test_the_figure_shows_means_intervals_and_numbers_of_runs():
    scores = scores_of(
        {"value": 0.2, "seed": "0"}, {"value": 0.6, "seed": "1"}, {"scenario": "frozenlake", "value": -0.25}, BASE
    )
    with paper_style():
        drawing = transfer_matrix(scores)
        drawing.figure.draw_without_rendering()
    (axes,) = drawing.figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert "0.40  n=2" in texts
    assert "[0.20, 0.60]" in texts
    assert "−0.25" in texts
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Frozen Lake", "Snake"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["untrained tiny", "Snake · uniform"]
    assert len(axes.patches) == 3, "what was not played has no cell"
    assert drawing.figure.get_size_inches()[0] == pytest.approx(3.4)


def test_without_evaluations_there_is_no_matrix_and_a_remark(caplog):
    assert transfer_matrix(pd.DataFrame(columns=list(COLUMNS))) is None
    assert "transfer matrix: left out" in caplog.text


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (("player", "", "hole_avoiding"), "avoids holes"),
        (("base", "", "org/model-3b"), "untrained model-3b"),
        (("remote", "", "org/model-72b"), "served model-72b"),
        (("trained", "frozenlake", "abs_adv"), "Frozen Lake · abs_adv (AAW)"),
        (("trained", "frozenlake_big", "abs_adv"), "Frozen Lake 6×6, slippery\nabs_adv (AAW)"),
    ],
)
def test_names_of_rows(row, name):
    assert row_name(*row) == name


class Evaluated(Store):
    """A store with evaluation runs beside a sweep."""

    def command(self, children, status="FINISHED"):
        """A parent with its children, each (tags, {metric: value}); returns its id."""
        tags = {"msgrpo.kind": "evaluations"}
        parent = self.client.create_run(self.experiment, start_time=self._tick(), tags=tags).info.run_id
        for own, metrics in children:
            tags = {"msgrpo.kind": "evaluation", "mlflow.parentRunId": parent, **own}
            run_id = self.client.create_run(self.experiment, start_time=self._tick(), tags=tags).info.run_id
            self.client.log_batch(run_id, metrics=[Metric(key, value, 0, 0) for key, value in metrics.items()])
            self.client.set_terminated(run_id, own.get("ends", "FINISHED"), end_time=self._tick())
        self.client.set_terminated(parent, status, end_time=self._tick())
        return parent


def lake(value):
    stem = "eval/frozenlake/normalised_score"
    return {stem: value, f"{stem}_low": value - 0.1, f"{stem}_high": value + 0.1, "eval/frozenlake/greedy_x": 1.0}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(store, sweep id, job id, first command, second command)."""
    home = tmp_path_factory.mktemp("evaluated")
    store = Evaluated(home)
    Evaluated(home, "bare")
    sweep = store.sweep([Job(updates=SHORT)])
    (job,) = store.client.search_runs([store.experiment], f"tags.`mlflow.parentRunId` = '{sweep}'")
    ours = {"policy": "run", "policy.kind": "run", "trained_on": "frozenlake", "sampler": "uniform", "seed": "0"}
    ours["source_run"] = job.info.run_id
    theirs = {**ours, "source_run": "another", "seed": "1"}
    large = {"policy": "org/large", "policy.kind": "remote", "model": "large"}
    success = {"eval/frozenlake/success_rate": 0.77, "eval/frozenlake/return_mean": 0.77}
    player = {"policy": "random", "policy.kind": "player"}
    first = store.command(
        [(ours, lake(0.3)), (theirs, lake(0.9)), (player, lake(0.0)), (large, {**lake(0.8), **success})]
    )
    second = store.command([(ours, lake(0.4)), ({**ours, "ends": "FAILED"}, lake(0.99))])
    store.command([(theirs, lake(0.7)), ({**player, "policy": "optimal"}, lake(1.0))], status="FAILED")
    return store, sweep, job.info.run_id, first, second


def test_matching_takes_what_the_sweep_trained_and_what_was_played_beside_it(evaluated, caplog):
    store, _, job, _, _ = evaluated
    table = load_evaluations(store.uri, "msgrpo", [job])
    scores = table[table["score"] == "normalised_score"].set_index("policy")["value"].to_dict()
    # the newer of two evaluations of one run; the failed one is told; optimal was played beside other runs only
    assert scores == {"run": 0.4, "random": 0.0, "org/large": 0.8}
    assert "1 evaluations that did not finish" in caplog.text
    run = table[table["policy"] == "run"].iloc[0]
    assert (run["low"], run["high"], run["trained_on"]) == (pytest.approx(0.3), pytest.approx(0.5), "frozenlake")


def test_evaluations_can_be_named(evaluated):
    store, _, job, first, second = evaluated
    table = load_evaluations(store.uri, "msgrpo", [], first)
    assert set(table["source_run"]) == {job, "another", ""}
    assert set(load_evaluations(store.uri, "msgrpo", [], "latest")["evaluations"]) == {second}
    assert set(load_evaluations(store.uri, "msgrpo", [], f"{first},{second}")["evaluations"]) == {first, second}
    assert load_evaluations(store.uri, "msgrpo", [job], "none").empty
    assert load_evaluations(store.uri, "msgrpo", ["unknown"]).empty


@pytest.mark.parametrize(
    ("experiment", "wanted", "words"),
    [
        ("msgrpo", "deadbeef", "evaluations 'deadbeef' is not in experiment 'msgrpo'; newest: "),
        ("msgrpo", " , ", "names no run"),
        ("bare", "latest", "has no finished evaluation; make one with python -m"),
        ("nosuch", "latest", "experiment 'nosuch' is not in"),
    ],
)
def test_evaluations_that_are_not_there_are_one_line(evaluated, experiment, wanted, words):
    with pytest.raises(TrackingError, match=words) as caught:
        load_evaluations(evaluated[0].uri, experiment, [], wanted)
    assert "\n" not in str(caught.value)


def test_a_served_model_is_a_line_in_the_papers_figure_and_a_trained_one_is_not(evaluated, tmp_path):
    store, sweep, _, _, _ = evaluated
    assert main(["--tracking-uri", store.uri, "--sweep", sweep, "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "learning_curves.csv")
    lines = table[table["kind"] == "reference"].set_index("player")["mean"]
    assert lines["large"] == 0.77
    assert lines["optimal"] == 1.0, "the training run's own reference players stay"
    matrix = pd.read_csv(tmp_path / "transfer_matrix.csv")
    assert matrix.set_index("kind")["value"].to_dict() == {"player": 0.0, "remote": 0.8, "trained": 0.4}


def test_an_untrained_self_is_no_extra_line():
    points = pd.DataFrame(
        [("r0", "snake", "uniform", "0", "eval/snake/return_mean", 0, 1.0)],
        columns=["run_id", "env", "method", "seed", "metric", "step", "value"],
    )
    scores = scores_of(
        {**BASE, "score": "return_mean"}, {**BASE, "model": "big", "policy": "big", "score": "return_mean"}
    )
    added = as_references(scores, points, {"tiny"})
    assert list(added["metric"]) == ["reference/snake/big/return_mean"]
    both = pd.concat([points, added], ignore_index=True)
    with paper_style():
        assert learning_curves(both).data["player"].dropna().to_list() == ["big"]
    assert as_references(scores_of(), points, set()).empty
    assert not math.isnan(both["value"].sum())
