"""The whole of `analysis/plots.py` on a made-up sweep: files, numbers, bytes, and what it does with gaps."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from analysis_synthetic import EVAL_EVERY, GRID, REFERENCES, UPDATES, Job, curves, filled

from analysis import figures, training_figures
from analysis.plots import FIGURES, main
from analysis.sheet import paper_style
from analysis.table import render
from msgrpo_lab.report.curves import MODES, OVER_EPISODES, join, label_methods, score_metric

SCRIPT = Path(__file__).parents[2] / "analysis" / "plots.py"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return filled(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def grid(store, tmp_path_factory):
    """Folder with the figures of the single-seed sweep."""
    out = tmp_path_factory.mktemp("grid") / "not" / "yet" / "there"
    assert main(["--tracking-uri", store.uri, "--out", str(out)]) == 0
    return out


def points_of(*jobs):
    """Points of jobs without a database in between."""
    runs = pd.DataFrame([{"env": job.env, "sampler": job.sampler, "seed": str(job.seed)} for job in jobs])
    runs["run_id"] = runs["name"] = [f"r{place}" for place in range(len(jobs))]
    runs["start"] = pd.date_range("2025-01-01", periods=len(jobs), freq="min", tz="UTC")
    runs[["credit", "model", "prompt"]] = ""
    rows = [
        (f"r{place}", metric, step, value)
        for place, job in enumerate(jobs)
        for metric, points in curves(job).items()
        for step, value in points.items()
    ]
    return join(label_methods(runs), pd.DataFrame(rows, columns=["run_id", "metric", "step", "value"]))


@pytest.mark.parametrize("name", FIGURES)
def test_png_is_a_picture_of_print_width(grid, name):
    pixels = matplotlib.image.imread(grid / f"{name}.png")
    one_column = name in ("score_against_optimal", "credit_fidelity")  # no profile of single seeds; one oracle
    assert pixels.shape[1] == pytest.approx((3.4 if one_column else 6.8) * 220, abs=1)
    assert 0.02 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.5
    edge = np.concatenate([pixels[0, :, :3].ravel(), pixels[-1, :, :3].ravel(), pixels[:, -1, :3].ravel()])
    assert (edge == 1.0).all(), "something is cut at the edge"


@pytest.mark.parametrize("name", FIGURES)
def test_pdf_embeds_truetype_fonts_and_no_date(grid, name):
    content = (grid / f"{name}.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/FontFile2" in content
    assert b"/Type3" not in content
    assert b"CreationDate" not in content


def test_run_by_path_from_another_folder_gives_the_same_bytes(store, tmp_path):
    arguments = ["--tracking-uri", store.uri, "--sweep", "none", "--out"]
    assert main([*arguments, str(tmp_path / "here")]) == 0
    command = [sys.executable, str(SCRIPT), *arguments, "there"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    here, there = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("here", "there"))
    assert sorted(here) == sorted(there) == sorted(Path(line).name for line in done.stdout.splitlines())
    assert len(here) == 3 * (len(FIGURES) - 1) + 2  # one sampler is no ablation
    assert [name for name in here if here[name] != there[name]] == []
    assert "1 finished job;" in here["table.md"].decode()
    assert "single runs" in here["table.md"].decode()


def test_learning_curves_csv_equals_what_was_logged(grid):
    table = pd.read_csv(grid / "learning_curves.csv")
    lines = table[table["kind"] == "method"]
    assert len(lines) == len(GRID) * (UPDATES // EVAL_EVERY + 1)
    for job in GRID:
        metric = f"eval/{job.env}/{score_metric(job.env)}"
        mine = lines[(lines["env"] == job.env) & (lines["method"] == job.sampler)].set_index("step")
        logged = curves(job)
        assert mine["mean"].to_dict() == logged[metric]
        assert mine["low"].to_dict() == logged[f"{metric}_low"]
        assert mine["high"].to_dict() == logged[f"{metric}_high"]
        assert set(mine["band"]) == {OVER_EPISODES}


def test_learning_curves_csv_holds_the_reference_lines(grid):
    table = pd.read_csv(grid / "learning_curves.csv")
    lines = table[table["kind"] == "reference"]
    for env, players in REFERENCES.items():
        place = 1 if score_metric(env) == "success_rate" else 0
        drawn = lines[lines["env"] == env].set_index("player")["mean"].to_dict()
        assert drawn == {player: values[place] for player, values in players.items()}


def test_training_curves_csv_equals_what_was_logged(grid):
    table = pd.read_csv(grid / "training_curves.csv")
    for job in GRID:
        mine = table[(table["env"] == job.env) & (table["method"] == job.sampler)]
        assert mine.set_index("step")["mean"].to_dict() == curves(job)["train/return_mean"]


def test_diagnostics_csv_equals_what_was_logged(grid):
    table = pd.read_csv(grid / "diagnostics.csv")
    names = {metric for row in training_figures.DIAGNOSTICS.values() for metric in row}
    assert set(table["metric"]) == names
    for job in GRID:
        for name in names:
            mine = table[(table["env"] == job.env) & (table["method"] == job.sampler) & (table["metric"] == name)]
            assert mine.set_index("step")["mean"].to_dict() == curves(job)[name]


def test_efficiency_csv_pairs_a_score_with_what_it_has_cost_so_far(grid):
    table = pd.read_csv(grid / "efficiency.csv")
    divisors = {"train/wall_s": 60.0, "train/env_steps": 1000.0, "train/trained_tokens": 1000.0}
    for job in GRID:
        logged = curves(job)
        scores = logged[f"eval/{job.env}/{score_metric(job.env)}"]
        of_job = table[(table["env"] == job.env) & (table["method"] == job.sampler)]
        assert of_job[of_job["cost"] == "updates"].set_index("x")["mean"].to_dict() == scores
        for metric, divisor in divisors.items():
            mine = of_job[of_job["cost"] == metric].set_index("step")
            assert mine["mean"].to_dict() == scores
            # after u updates: what the u-th of them, at step u − 1, has logged
            spent = {0: 0.0} | {step: logged[metric][step - 1] for step in scores if step}
            assert (mine["x"] * divisor).to_dict() == pytest.approx(spent)


def test_final_comparison_csv_equals_the_last_evaluation(grid):
    table = pd.read_csv(grid / "final_comparison.csv")
    for job in GRID:
        for mode, prefix in MODES.items():
            metric = f"eval/{job.env}/{prefix}{score_metric(job.env)}"
            rows = (table["env"] == job.env) & (table["method"] == job.sampler) & (table["mode"] == mode)
            (row,) = table[rows & (table["kind"] == "method")].to_dict("records")
            logged = curves(job)
            assert (row["start"], row["end"]) == (logged[metric][0], logged[metric][UPDATES])
            assert row["end_low"] == logged[f"{metric}_low"][UPDATES]
            assert row["end_high"] == logged[f"{metric}_high"][UPDATES]


def test_the_line_drawn_is_the_line_in_the_csv():
    with paper_style():
        drawing = figures.training_curves(points_of(Job()))
    (line,) = drawing.figure.axes[0].lines
    assert list(line.get_xdata()) == list(drawing.data["step"])
    assert list(line.get_ydata()) == list(drawing.data["mean"])


def test_seeds_are_drawn_as_single_dots_and_a_bootstrap_interval():
    jobs = [Job(seed=seed, updates=10) for seed in range(4)]
    with paper_style():
        drawing = figures.final_comparison(points_of(*jobs))
    runs = drawing.data[(drawing.data["kind"] == "run") & (drawing.data["mode"] == "sampled")]
    assert sorted(runs["end"]) == sorted(curves(job)["eval/frozenlake/success_rate"][10] for job in jobs)
    (cell,) = drawing.data[(drawing.data["kind"] == "method") & (drawing.data["mode"] == "sampled")].to_dict("records")
    assert runs["end"].min() <= cell["end_low"] < cell["end"] < cell["end_high"] <= runs["end"].max()
    labels = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert "95 % bootstrap interval over seeds" in labels
    assert not any("one seed" in label for label in labels)


@pytest.mark.parametrize(
    ("jobs", "label"),
    [
        ([Job(updates=10)], "95 % interval over evaluation episodes (one seed)"),
        ([Job(updates=10), Job(updates=10, seed=1)], "mean ± 1 std over 2 seeds"),
    ],
)
def test_legend_says_what_the_band_is(jobs, label):
    with paper_style():
        drawing = figures.learning_curves(points_of(*jobs))
    names = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert names == ["uniform", label, *(["single best run"] if len(jobs) > 1 else [])]


def test_references_are_labelled_at_the_edge():
    with paper_style():
        axes = figures.learning_curves(points_of(Job(updates=10))).figure.axes[0]
    assert [text.get_text() for text in axes.texts] == [
        "random 0.01",
        "ignores prompt 0.27",
        "avoids holes 0.86",
        "compact ceiling 0.90",
        "optimal 1.00",
    ]


MANY = [
    Job(env=env, sampler=sampler, updates=10)
    for env in ("snake", "frozenlake", "frozenlake_slippery")
    for sampler in ("uniform", "abs_adv", "pps", "dpp")
]


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize(
    "jobs",
    [
        [Job(updates=10)],
        [Job(env="snake", sampler="abs_adv", seed=seed, updates=10) for seed in range(8)],
        MANY,
        [Job(updates=10, without=("reference/", "sampler/", "train/wall_s", "train/token_entropy"))],
        [Job(updates=10), Job(env="snake", updates=10, without=("sampler/", "train/env_steps", "eval/snake/greedy"))],
        [Job(updates=1, seed=seed) for seed in range(2)],
    ],
    ids=["one-job", "eight-seeds", "twelve-cells", "few-metrics", "uneven", "one-update"],
)
def test_every_figure_takes_every_shape_of_sweep(name, jobs):
    with paper_style():
        drawing = FIGURES[name](points_of(*jobs))
    envs = {job.env for job in jobs if name != "credit_fidelity" or job.env.startswith("frozenlake")}
    missing = any("train/token_entropy" in job.without for job in jobs) and name == "entropies"
    alone = len({job.sampler for job in jobs}) == 1 and name == "sampler_ablation"
    if missing or alone or not envs:
        assert drawing is None
        return
    drawing.figure.draw_without_rendering()
    assert {env for env in drawing.data["env"] if isinstance(env, str)} - {"all scenarios"} == envs


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("learning_curves", ("eval/",)),
        ("final_comparison", ("eval/",)),
        ("training_curves", ("train/return_mean",)),
        ("efficiency", ("eval/",)),
        ("sampler_ablation", ("eval/",)),
        ("score_against_optimal", ("eval/frozenlake/normalised",)),
        ("credit_fidelity", ("credit/",)),
        ("entropies", ("train/action_entropy",)),
        ("diagnostics", ("train/", "sampler/")),
    ],
)
def test_a_figure_with_nothing_to_show_says_so(name, without, caplog):
    assert FIGURES[name](points_of(Job(updates=5, without=without))) is None
    assert "left out" in caplog.text


def test_an_unlogged_diagnostic_leaves_out_its_row_and_says_so(caplog):
    full, less = (
        FIGURES["diagnostics"](points_of(Job(updates=5, without=without))) for without in ((), ("sampler/ess",))
    )
    assert len(less.figure.axes) == len(full.figure.axes) - 1
    assert "no job logged sampler/ess" in caplog.text


def test_a_panel_without_numbers_is_marked():
    jobs = [Job(updates=5), Job(env="snake", updates=5, without=("sampler/",))]
    texts = [text.get_text() for axes in FIGURES["diagnostics"](points_of(*jobs)).figure.axes for text in axes.texts]
    assert texts == ["not logged", "not logged"]


def test_evaluation_elsewhere_gets_its_own_panel():
    points = points_of(Job(updates=10))
    other = points[points["metric"].str.startswith("eval/")]
    other = other.assign(metric=other["metric"].str.replace("/frozenlake/", "/frozenlake_big/"))
    figure = figures.learning_curves(pd.concat([points, other], ignore_index=True)).figure
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]
    assert titles == ["Frozen Lake", "Frozen Lake → Frozen Lake 6×6, slippery"]


def test_unfinished_jobs_are_told_on_stderr_and_in_the_table(store, tmp_path, capsys):
    assert main(["--tracking-uri", store.uri, "--sweep", store.seeds, "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "note: left out: job frozenlake-uniform-3" in captured.err
    assert "seed 4) is RUNNING" in captured.err
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "6 finished jobs" in text
    assert "- left out: job frozenlake-uniform-3" in text
    assert set(pd.read_csv(tmp_path / "learning_curves.csv")["seeds"].dropna()) == {3}


@pytest.mark.parametrize("extra", [["--sweep", "deadbeef"], ["--experiment", "bare"]])
def test_nothing_to_draw_exits_2_with_one_line_and_writes_nothing(store, tmp_path, capsys, extra):
    out = tmp_path / "figures"
    assert main(["--tracking-uri", store.uri, "--out", str(out), *extra]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("plots.py: ")
    assert captured.err.count("\n") == 1
    assert not out.exists()


def test_no_database_exits_2_and_names_the_remedy(tmp_path, capsys):
    assert main(["--tracking-uri", f"sqlite:///{tmp_path}/absent.db"]) == 2
    assert "make sweep" in capsys.readouterr().err


def test_order_of_jobs_changes_nothing():
    jobs = [replace(job, updates=10) for job in GRID]
    there, back = points_of(*jobs), points_of(*reversed(jobs))
    assert render(there, "x", []) == render(back, "x", [])
