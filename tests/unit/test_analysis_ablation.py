"""What a sampler gains, on runs written out by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from analysis_synthetic import points_of

from analysis.comparison_figures import (
    ALL,
    AT_TOKENS,
    AT_UPDATES,
    ablation,
    counterparts,
    run_scores,
    sampler_ablation,
    score_against_optimal,
)
from analysis.sheet import paper_style
from analysis.training_figures import priced
from msgrpo_lab.report.comparisons import normalised_scores, profiles
from msgrpo_lab.report.curves import best_run

LAKE = "eval/frozenlake/normalised_score"


def job(scores, tokens_an_update, env="frozenlake", updates=10, **others):
    """Scores at 0, 5 and 10 updates; update u logs its tokens at step u − 1."""
    spent = {u - 1: float(tokens_an_update * u) for u in range(1, updates + 1)}
    return {
        f"eval/{env}/normalised_score": dict(zip((0, 5, 10), scores, strict=True)),
        "train/trained_tokens": spent,
        **others,
    }


THREE = {
    ("frozenlake", "uniform", "0"): job((0.0, 0.2, 0.4), 100),
    ("frozenlake", "uniform", "1"): job((0.0, 0.3, 0.5), 100),
    ("frozenlake", "uniform", "2"): job((0.0, 0.4, 0.6), 100),
    ("frozenlake", "abs_adv", "0"): job((0.0, 0.4, 0.5), 200),
    ("frozenlake", "abs_adv", "1"): job((0.0, 0.6, 0.7), 200),
    ("frozenlake", "abs_adv", "2"): job((0.0, 0.2, 0.9), 200),
}


def row_of(table, **chosen):
    for column, value in {"mode": "sampled", "score": "normalised_score", **chosen}.items():
        table = table[table[column] == value]
    (row,) = table.to_dict("records")
    return row


def test_equal_updates_by_hand():
    row = row_of(ablation(points_of(THREE)), budget=AT_UPDATES)
    assert (row["at"], row["pairs"], row["method"], row["base"]) == (10.0, 3, "abs_adv", "uniform")
    # pairs 0.5 − 0.4, 0.7 − 0.5, 0.9 − 0.6: mean 0.2, s = 0.1; t_{0.975, 2} = 4.302653: half-width 0.248414
    assert row["difference"] == pytest.approx(0.2)
    assert (row["low"], row["high"]) == (pytest.approx(0.2 - 0.248414, abs=1e-6), pytest.approx(0.448414, abs=1e-6))
    assert (row["mean"], row["base_mean"]) == (pytest.approx(0.7), pytest.approx(0.5))
    # 0.5 beats 0.4 and ties 0.5; 0.7 and 0.9 beat all three: (1.5 + 3 + 3)/9
    assert row["better"] == pytest.approx(7.5 / 9)
    assert (row["wins"], row["losses"], row["sign_p"]) == (3, 0, 0.25)


def test_equal_tokens_by_hand():
    row = row_of(ablation(points_of(THREE)), budget=AT_TOKENS)
    # uniform has trained on 10 · 100 tokens in all; abs_adv on as many after 5 updates
    assert row["at"] == 1000.0
    # 0.4 − 0.4, 0.6 − 0.5, 0.2 − 0.6: mean −0.1
    assert row["difference"] == pytest.approx(-0.1)
    assert (row["wins"], row["losses"], row["sign_p"]) == (1, 1, 1.0)


def test_a_score_between_two_evaluations_is_linear_in_tokens():
    jobs = {
        ("frozenlake", "uniform", "0"): job((0.0, 0.2, 0.4), 100),
        ("frozenlake", "abs_adv", "0"): job((0.0, 0.4, 0.6), 125),
    }
    row = row_of(ablation(points_of(jobs)), budget=AT_TOKENS)
    # 1000 tokens lie between 5 updates (625) and 10 (1250): 0.4 + 0.2 · 375/625 = 0.52
    assert (row["mean"], row["base_mean"]) == (pytest.approx(0.52), pytest.approx(0.4))


def test_one_seed_has_no_interval():
    jobs = {key: value for key, value in THREE.items() if key[2] == "0"}
    row = row_of(ablation(points_of(jobs)), budget=AT_UPDATES)
    assert row["difference"] == pytest.approx(0.1)
    assert all(math.isnan(row[end]) for end in ("low", "high", "better_low", "better_high"))


def test_only_seeds_that_both_have_are_compared_and_told(caplog):
    jobs = {key: value for key, value in THREE.items() if key != ("frozenlake", "abs_adv", "0")}
    row = row_of(ablation(points_of(jobs)), budget=AT_UPDATES)
    # seeds 1 and 2: 0.2 and 0.3
    assert (row["pairs"], row["difference"]) == (2, pytest.approx(0.25))
    assert "compared on the 2 seeds that both have" in caplog.text


def test_without_token_counts_only_updates_are_compared_and_it_is_told(caplog):
    jobs = {key: {LAKE: value[LAKE]} for key, value in THREE.items()}
    table = ablation(points_of(jobs))
    assert set(table["budget"]) == {AT_UPDATES}
    assert "not compared at equal trained tokens" in caplog.text


def test_over_scenarios_every_scenario_weighs_alike():
    snake = {
        ("snake", sampler, seed): job((0.0, 0.0, score), 100, env="snake")
        for sampler, scores in (("uniform", (0.5, 0.5)), ("abs_adv", (0.1, 0.1)))
        for seed, score in zip("01", scores, strict=True)
    }
    row = row_of(ablation(points_of(THREE | snake)), budget=AT_UPDATES, env=ALL)
    # (0.2 − 0.4)/2; five pairs, three won; the snake pairs are alike, so resampling moves the lake's mean alone
    assert row["difference"] == pytest.approx(-0.1)
    assert (row["pairs"], row["wins"], row["losses"]) == (5, 3, 2)
    # the lake's resampled mean gain lies in [0.1, 0.3]
    assert -0.15 - 1e-9 <= row["low"] < row["high"] <= -0.05 + 1e-9
    # P on the lake 7.5/9, on Snake 0
    assert row["better"] == pytest.approx(7.5 / 18)


def test_a_method_is_compared_with_its_own_counterpart():
    names = ["uniform, gigpo", "abs_adv, gigpo", "uniform, rloo", "pods, rloo", "dash"]
    points = pd.DataFrame([{"env": "snake", "method": method} for method in names])
    assert counterparts(points, "snake") == [("abs_adv, gigpo", "uniform, gigpo"), ("pods, rloo", "uniform, rloo")]


def test_tokens_belong_to_the_updates_before_the_score():
    runs = run_scores(points_of(THREE), "frozenlake", "uniform", LAKE)
    assert list(runs["0"]["tokens"]) == [0.0, 500.0, 1000.0]


def test_the_figure_shows_the_differences_of_its_data():
    with paper_style():
        drawing = sampler_ablation(points_of(THREE))
    left, right = drawing.figure.axes
    gains, chances = (
        [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"] for axes in (left, right)
    )
    assert gains == pytest.approx([0.2, -0.1])
    assert chances[0] == pytest.approx(7.5 / 9)
    spans = [list(line.get_xdata()) for line in left.lines if line.get_marker() == "None"]
    assert pytest.approx([-0.048414, 0.448414], abs=1e-6) in spans


def test_an_interval_wider_than_the_scale_does_not_shrink_the_panel():
    # gains 0.1 and 0.9 of two seeds: Student's half-width is 12.7 · 0.566/√2 = 5.1
    jobs = {key: value for key, value in THREE.items() if key[2] != "2"}
    jobs["frozenlake", "abs_adv", "1"] = job((0.0, 0.6, 1.4), 200)
    with paper_style():
        drawing = sampler_ablation(points_of(jobs))
    assert drawing.data["high"].max() > 5
    assert drawing.figure.axes[0].get_xlim() == (pytest.approx(-1.08), pytest.approx(1.08))


def test_normalised_scores_and_profile_by_hand():
    points = points_of(THREE)
    table = normalised_scores(points).set_index("method")
    assert table.loc["uniform", "end"] == pytest.approx(0.5)
    assert table.loc["abs_adv", "end"] == pytest.approx(0.7)
    assert (table["start"] == 0.0).all()
    assert (table["seeds"] == 3).all()
    profile = profiles(points)
    shares = profile[profile["method"] == "abs_adv"].set_index("threshold")["share"]
    # runs at 0.5, 0.7, 0.9: all above 0.4, two above 0.5, none above 0.9
    assert shares[[0.4, 0.5, 0.6, 0.7, 0.9]].to_list() == pytest.approx([1.0, 2 / 3, 2 / 3, 1 / 3, 0.0])


def test_a_profile_takes_several_runs():
    points = points_of({key: value for key, value in THREE.items() if key[2] == "0"})
    assert profiles(points).empty
    with paper_style():
        assert len(score_against_optimal(points).figure.axes) == 1


def test_the_best_run_ends_highest():
    metric = LAKE
    best = best_run(points_of(THREE), "frozenlake", "uniform", metric)
    assert list(best["value"]) == [0.0, 0.4, 0.6]
    assert set(best["seed"]) == {"2"}


def test_of_equal_ends_the_better_run_on_the_way_is_best():
    jobs = {
        ("frozenlake", "uniform", "0"): job((0.0, 0.2, 0.6), 1),
        ("frozenlake", "uniform", "1"): job((0.0, 0.3, 0.6), 1),
    }
    assert set(best_run(points_of(jobs), "frozenlake", "uniform", LAKE)["seed"]) == {"1"}


def test_a_single_run_has_no_best():
    points = points_of({("frozenlake", "uniform", "0"): job((0.0, 0.2, 0.6), 1)})
    assert best_run(points, "frozenlake", "uniform", LAKE).empty


def test_a_score_is_priced_with_the_mean_over_runs():
    success = {"eval/frozenlake/success_rate": {0: 0.0, 5: 0.5, 10: 1.0}}
    jobs = {
        ("frozenlake", "uniform", "0"): job((0, 0, 0), 100, **success),
        ("frozenlake", "uniform", "1"): job((0, 0, 0), 300, **success),
    }
    table = priced(points_of(jobs), "frozenlake", "train/trained_tokens")
    assert list(table["x"]) == [0.0, 1000.0, 2000.0]
    assert list(table["mean"]) == [0.0, 0.5, 1.0]


def test_a_method_with_a_run_of_unknown_cost_is_not_priced():
    success = {"eval/frozenlake/success_rate": {0: 0.0, 5: 0.5, 10: 1.0}}
    jobs = {
        ("frozenlake", "uniform", "0"): job((0, 0, 0), 100, **success),
        ("frozenlake", "uniform", "1"): success,
    }
    assert priced(points_of(jobs), "frozenlake", "train/trained_tokens").empty
