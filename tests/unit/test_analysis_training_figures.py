"""Entropies and credit fidelity over training, on runs written out by hand."""

from __future__ import annotations

import pytest
from analysis_synthetic import points_of

from analysis.sheet import paper_style
from analysis.training_figures import credit_fidelity, diagnostics, entropies
from msgrpo_lab.report.curves import OVER_GROUPS, OVER_SEEDS


def run(token, action):
    """Entropies at steps 0, 1, …"""
    return {"train/token_entropy": dict(enumerate(token)), "train/action_entropy": dict(enumerate(action))}


def test_the_way_is_the_mean_over_runs_at_the_steps_that_all_have():
    jobs = {
        ("snake", "uniform", "0"): run((1.0, 0.8, 0.4), (1.2, 0.6, 0.2)),
        ("snake", "uniform", "1"): run((1.2, 0.6), (1.0, 0.8)),
    }
    with paper_style():
        drawing = entropies(points_of(jobs))
    mean = drawing.data[drawing.data["kind"] == "mean"]
    assert list(mean["step"]) == [0, 1]
    assert list(mean["token"]) == pytest.approx([1.1, 0.7])
    assert list(mean["action"]) == pytest.approx([1.1, 0.7])
    assert (drawing.data["kind"] == "run").sum() == 5
    (axes,) = drawing.figure.axes
    start, end = [line for line in axes.lines if line.get_marker() == "o"]
    assert (start.get_xdata()[0], start.get_ydata()[0]) == (pytest.approx(1.1), pytest.approx(1.1))
    assert start.get_markerfacecolor() == "white"
    assert (end.get_xdata()[0], end.get_ydata()[0]) == (pytest.approx(0.7), pytest.approx(0.7))
    assert "single runs" in [text.get_text() for text in drawing.figure.legends[0].get_texts()]


def test_a_step_with_one_of_the_entropies_is_left_out():
    values = run((1.0, 0.8, 0.6), (1.0, 0.7, 0.5))
    del values["train/action_entropy"][1]  # an epoch of two updates: its rollout is told with the first
    with paper_style():
        data = entropies(points_of({("snake", "uniform", "0"): values})).data
    assert list(data.loc[data["kind"] == "mean", "step"]) == [0, 2]


def fidelity(cosine, drawn):
    return {
        "credit/gradient_cosine": {0: cosine, 8: cosine - 0.1},
        "credit/gradient_cosine_low": {0: cosine - 0.05, 8: cosine - 0.2},
        "credit/gradient_cosine_high": {0: cosine + 0.05, 8: cosine},
        "credit/drawn_gradient_cosine": {0: drawn, 8: drawn},
    }


def test_fidelity_of_a_single_run_has_its_interval_over_groups():
    jobs = {("frozenlake", "uniform", "0"): fidelity(0.6, 0.4), ("snake", "uniform", "0"): run((1.0,), (1.0,))}
    with paper_style():
        drawing = credit_fidelity(points_of(jobs))
    assert set(drawing.data["env"]) == {"frozenlake"}, "Snake has no oracle, and no panel"
    pool = drawing.data[drawing.data["metric"] == "credit/gradient_cosine"]
    assert list(pool["mean"]) == pytest.approx([0.6, 0.5])
    assert list(pool["low"]) == pytest.approx([0.55, 0.4])
    assert set(pool["band"]) == {OVER_GROUPS}
    (axes,) = drawing.figure.axes
    assert [(line.get_linestyle(), line.get_ydata()[0]) for line in axes.lines] == [("-", 0.6), ("--", 0.4)]
    labels = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert "95 % interval over the groups of a rollout (one seed)" in labels


def test_fidelity_of_several_runs_is_their_mean_and_spread():
    jobs = {("frozenlake", "uniform", seed): fidelity(value, 0.4) for seed, value in (("0", 0.5), ("1", 0.7))}
    with paper_style():
        data = credit_fidelity(points_of(jobs)).data
    pool = data[data["metric"] == "credit/gradient_cosine"]
    # 0.5 and 0.7: mean 0.6, s = 0.141421
    assert pool["mean"].iloc[0] == pytest.approx(0.6)
    assert pool["high"].iloc[0] == pytest.approx(0.741421, abs=1e-6)
    assert set(pool["band"]) == {OVER_SEEDS}


def test_diagnostics_do_not_take_an_interval_over_episodes_for_one_over_groups():
    with paper_style():
        data = diagnostics(points_of({("snake", "uniform", "0"): run((1.0, 0.5), (0.9, 0.4))})).data
    assert set(data["band"]) == {"none"}
