"""The experiment card: numbers by hand, text that cannot become markup, and the artifact of a real store."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from msgrpo_lab.report.card import CARD, keep_card, main, over_runs, render
from msgrpo_lab.report.markdown import code_block, count, duration, escape, number, table
from msgrpo_lab.report.sweep import JobRecord, SweepRecord, read_sweep
from msgrpo_lab.tracking.tracking import MLflowTracking

ROOT = Path(__file__).parents[2]
HARDWARE = {"processor": "Abacus 9", "cores": 4, "memory_gb": 8.0, "torch_threads": 2, "python": "3.11", "system": "X"}


def job(sampler: str = "uniform", seed: str = "0", end: float = 0.5, **changes: Any) -> JobRecord:
    """A finished job of 10 updates that took an hour, half of it training."""
    history = {
        "eval/frozenlake/success_rate": [(0, 0.1), (10, end)],
        "eval/frozenlake/greedy_success_rate": [(0, 0.0), (10, end + 0.1)],
        "eval/frozenlake/normalised_score": [(0, 0.0), (10, end - 0.05)],
        "eval/frozenlake/episode_length": [(0, 6.0), (10, 5.0)],
        "train/episode_length": [(0, 7.0), (5, 6.5), (9, 4.0)],
        "train/turns": [(0, 100.0), (1, 200.0)],
        "train/completion_tokens": [(0, 2.0), (1, 3.0)],
        "perf/credit_s": [(0, 4.0), (1, 5.0)],
        "perf/evaluation_s": [(0, 30.0), (10, 60.0)],
        "perf/train_flops": [(0, 1e12), (1, 3e12)],
    }
    last = {
        "train/wall_s": 1800.0,
        "train/env_steps": 12_345.0,
        "train/trained_tokens": 67_890.0,
        "reference/frozenlake/random/return_mean": 0.01,
        "reference/frozenlake/random/success_rate": 0.01,
        "reference/frozenlake/optimal/return_mean": 0.95,
    }
    params = {"evaluation.episodes": "400", "evaluation.every": "8", "evaluation.temperature": "0.7"}
    defaults: dict[str, Any] = {
        "run_id": f"{sampler}{seed}",
        "name": f"frozenlake-{sampler}-seed{seed}",
        "status": "FINISHED",
        "duration_s": 3600.0,
        "tags": {"env": "frozenlake", "sampler": sampler, "seed": seed, "msgrpo.commit": "c0ffee"},
        "params": params,
        "last": last,
        "history": history,
        "hardware": HARDWARE,
        "packages": {"torch": "2.0", "unrelated": "9"},
        "dirty": False,
    }
    return JobRecord(**{**defaults, **changes})


def sweep(*jobs: JobRecord, **changes: Any) -> SweepRecord:
    defaults: dict[str, Any] = {
        "run_id": "abc",
        "name": "sweep sampler × seed",
        "status": "FINISHED",
        "start_ms": 0,
        "end_ms": 7_200_000,
        "tags": {"msgrpo.command": "msgrpo_lab.train -m seed=0,1", "msgrpo.swept": "sampler,seed"},
        "jobs": jobs,
    }
    return SweepRecord(**{**defaults, **changes})


def row(card: str, *starts: str) -> list[str]:
    """The cells of the one table row that begins with `starts`."""
    wanted = "| " + " | ".join(starts) + " | "
    (line,) = [line for line in card.splitlines() if line.startswith(wanted)]
    return line.strip("| ").split(" | ")


def section(card: str, title: str) -> str:
    (text,) = [part for part in card.split("\n## ") if part.startswith(title)]
    return text


THREE = sweep(job(seed="0", end=0.4), job(seed="1", end=0.5), job(seed="2", end=0.6), job("abs_adv", end=0.9))


def test_interval_over_runs_by_hand() -> None:
    # 0.4, 0.5, 0.6: s = 0.1, t_{0.975, 2} = 4.302653, half-width 0.248414
    mean, low, high = over_runs([0.4, 0.5, 0.6])
    assert (mean, low, high) == (
        pytest.approx(0.5),
        pytest.approx(0.251586, abs=1e-6),
        pytest.approx(0.748414, abs=1e-6),
    )


def test_results_have_means_and_intervals_over_runs() -> None:
    cells = row(section(render(THREE), "Results"), "frozenlake", "uniform")
    assert cells[2:5] == ["3", "10", "success rate"]
    assert cells[5] == "0.100 \\[0.100, 0.100\\] → 0.500 \\[0.252, 0.748\\]"
    assert cells[7] == "0.450 \\[0.202, 0.698\\]"


def test_a_cell_with_one_seed_has_no_interval_and_the_card_says_so() -> None:
    text = section(render(THREE), "Results")
    assert row(text, "frozenlake", "abs\\_adv")[5] == "0.100 → 0.900"
    assert "Cells with one seed have no interval over runs" in text
    assert "Cells with one seed" not in render(sweep(*THREE.jobs[:3]))


def test_compute_adds_up() -> None:
    text = section(render(THREE), "Compute")
    cells = row(text, "frozenlake", "uniform")
    # three jobs of 1 h with 2 threads; evaluation 90 s each; 100·2 + 200·3 tokens; credit 9 s of 1800 s
    assert cells[2:] == [
        "3 h 00 min",
        "1 h 30 min",
        "4 min 30 s",
        "6.00",
        "37 035",
        "2 400",
        "203 670",
        "1.20e+13",
        "0.50 %",
    ]
    assert row(text, "all jobs")[2] == "4 h 00 min"
    assert "Accelerator-hours" not in text


def test_the_pause_of_a_resumed_job_is_told() -> None:
    plain = job()
    again = job(seed="1", tags={**plain.tags, "seed": "1", "msgrpo.resumed": "2"})
    assert "1 job resumed: the pause before counts as job time." in render(sweep(plain, again))
    assert "resumed" not in render(sweep(plain))


def test_accelerator_hours_are_told_where_there_was_one() -> None:
    gpu = {**HARDWARE, "accelerators": ["Card"]}
    assert "Accelerator-hours: 1.00." in render(sweep(job(hardware=gpu)))
    on_cpu = job(hardware=gpu, params={"trainer.accelerator": "cpu"})
    assert "Accelerator-hours" not in render(sweep(on_cpu))


def test_what_a_job_did_not_log_is_a_dash_and_stops_nothing() -> None:
    bare = job(history={}, last={}, hardware={}, packages={}, params={}, duration_s=None)
    card = render(sweep(bare))
    assert row(section(card, "Compute"), "frozenlake", "uniform")[2:] == ["–"] * 9
    assert "No finished job logged a held-out score." in card
    assert "No job was evaluated on held-out episodes." in card


def test_unfinished_jobs_are_named_and_in_no_mean() -> None:
    failed = job(seed="7", end=0.0, status="FAILED", duration_s=61.0)
    card = render(sweep(job(end=0.4), failed, status="FAILED"))
    assert "FAILED: 1 of 2 jobs finished" in card
    assert row(section(card, "Unfinished"), "frozenlake-uniform-seed7")[2:] == ["FAILED", "1 min 01 s"]
    assert row(section(card, "Results"), "frozenlake", "uniform")[5] == "0.100 → 0.400"
    assert "Unfinished jobs\n\nNone." in render(THREE)


def test_baselines_lengths_protocol_and_origin_are_told() -> None:
    card = render(THREE)
    assert row(card, "frozenlake", "optimal") == ["frozenlake", "optimal", "0.950", "–"]
    assert row(section(card, "Episode lengths"), "frozenlake", "uniform")[2:4] == ["7.00 → 4.00", "6.00 → 5.00"]
    assert "400 held-out environment seeds, from 10000000 on" in card
    assert "sampled at temperature 0.7, and greedy" in card
    assert "Machine of 4 jobs: Abacus 9, 4 cores, 8.0 GB, no accelerator, torch threads: 2" in card
    assert "torch 2.0" in card
    assert "unrelated" not in card
    assert "c0ffee; no uncommitted changes" in card
    assert "```text\npython -m msgrpo_lab.train -m seed=0,1\n```" in card
    assert row(card, "seeds") == ["seeds", "0, 1, 2"]


def test_settings_that_differ_are_two_methods_not_two_seeds() -> None:
    jobs = [
        job(seed=str(seed), params={"optim.lr": rate, "model.seed": str(seed), "checkpoint.every": str(seed)})
        for seed, rate in enumerate(("1e-3", "1e-4"))
    ]
    assert [method for _, method in sweep(*jobs).cells()] == ["uniform, optim.lr=1e-3", "uniform, optim.lr=1e-4"]


HOSTILE = "a|b`c*_[x](y)<img src=z>\n# title"


def test_text_of_a_configuration_cannot_become_markup() -> None:
    tags = {"env": HOSTILE, "sampler": HOSTILE, "seed": HOSTILE, "msgrpo.commit": HOSTILE}
    card = render(sweep(job(tags=tags, status="FAILED", name=HOSTILE), job(tags=tags), name=HOSTILE))
    plain = re.sub(r"\\.", "", card)
    assert "<img" not in plain
    assert "[x](y)" not in plain
    assert "\n# title" not in plain
    for part in plain.split("\n\n"):
        assert len({line.count("|") for line in part.splitlines() if part.startswith("|")}) <= 1, "a cell was torn"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("abs_adv", "abs\\_adv"), ("a\nb\tc", "a b c"), ("x|y", "x\\|y"), ("<b>", "\\<b\\>"), (None, "None"), ("", "")],
)
def test_escape(text: object, expected: str) -> None:
    assert escape(text) == expected


def test_a_fence_is_longer_than_any_in_its_text() -> None:
    assert code_block("x ```` y") == "`````text\nx ```` y\n`````"


def test_numbers_as_text() -> None:
    assert [number(-0.5, 2), number(None), number(float("nan"))] == ["−0.50", "–", "–"]
    assert [count(1_234_567.4), count(None)] == ["1 234 567", "–"]
    assert [duration(59.4), duration(125), duration(7380), duration(None)] == ["59 s", "2 min 05 s", "2 h 03 min", "–"]
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A database with a sweep of one job, closed as a real one is: (address, parent id)."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('card')}/mlflow.db"
    tracking = MLflowTracking(tracking_uri=uri, log_system_metrics=False)
    parent = tracking.start_sweep(["msgrpo_lab.train", "-m", "seed=0"], ["seed"])
    client = MlflowClient(uri)
    experiment = client.get_run(parent).info.experiment_id
    tags = {"msgrpo.kind": "job", "mlflow.parentRunId": parent, "env": "snake", "sampler": "uniform", "seed": "0"}
    run_id = client.create_run(experiment, tags=tags, run_name="snake-uniform").info.run_id
    metrics = [Metric("eval/snake/return_mean", value, 0, step) for step, value in ((0, -0.25), (4, 1.5))]
    client.log_batch(run_id, metrics=metrics, params=[Param("evaluation.episodes", "50")])
    client.log_dict(run_id, HARDWARE, "provenance/hardware.json")
    client.set_terminated(run_id, "FINISHED")
    tracking.finish_sweep(parent, "FINISHED")
    keep_card(uri, parent)
    return uri, parent


def kept(uri: str, parent: str, folder: Path) -> str:
    return Path(MlflowClient(uri).download_artifacts(parent, CARD, str(folder))).read_text(encoding="utf-8")


def test_a_sweep_that_ends_keeps_its_card(store: tuple[str, str], tmp_path: Path) -> None:
    card = kept(*store, tmp_path)
    assert row(section(card, "Results"), "snake", "uniform")[2:6] == ["1", "4", "return", "−0.250 → 1.500"]
    assert "FINISHED: 1 of 1 job finished" in card
    assert "Abacus 9" in card


def test_the_card_can_be_made_again(store: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri, parent = store
    assert main([parent, "--tracking-uri", uri, "--output", str(tmp_path / "mine.md")]) == 0
    assert (tmp_path / "mine.md").read_text(encoding="utf-8") == kept(uri, parent, tmp_path)
    assert main(["--tracking-uri", uri]) == 0
    assert f"card.md of sweep {parent}" in capsys.readouterr().out


def test_an_interrupted_program_still_makes_the_card_as_it_ends(store: tuple[str, str], tmp_path: Path) -> None:
    uri, parent = store
    code = f"""
import atexit
from msgrpo_lab.tracking.database import mlflow_module
from msgrpo_lab.report.card import keep_card
mlflow_module()  # by then every job has imported it
atexit.register(keep_card, {uri!r}, {parent!r})
"""
    MlflowClient(uri).log_text(parent, "an older card", CARD)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Abacus 9" in kept(uri, parent, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch", "--tracking-uri", "{uri}"], "nosuch"),
        (["{job}", "--tracking-uri", "{uri}"], "is no sweep's parent"),
        (["--tracking-uri", "{uri}", "--experiment", "other"], "no such experiment"),
        (["--tracking-uri", "sqlite:///{folder}/absent.db"], "no database is there"),
        (["--tracking-uri", "nosuch://x"], "unknown scheme"),
        (["{parent}", "--tracking-uri", "{uri}", "--output", "{folder}/not/there.md"], "not/there.md"),
    ],
)
def test_what_cannot_be_made_is_one_line(
    store: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    uri, parent = store
    client = MlflowClient(uri)
    (child,) = read_sweep(client, parent).jobs
    names = {"uri": uri, "parent": parent, "job": child.run_id, "folder": str(tmp_path)}
    assert main([argument.format(**names) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("msgrpo_lab: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_card_that_cannot_be_written_does_not_stop_the_sweep_from_closing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = MLflowTracking(tracking_uri=uri, log_system_metrics=False)
    parent = tracking.start_sweep(["msgrpo_lab.train", "-m"], [])
    (tmp_path / "artifacts").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING):
        tracking.finish_sweep(parent, "FINISHED")
        keep_card(uri, parent)
    assert MlflowClient(uri).get_run(parent).info.status == "FINISHED"
    assert f"make it with python -m msgrpo_lab.report.card {parent}" in caplog.text
