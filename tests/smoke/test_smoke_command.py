"""The real command in processes of its own: a run, the main sweep, its figures, and what is said of mistakes."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

ROOT = Path(__file__).parents[2]
TINY = ("model=tiny", "debug=fast", "evaluation.reference_simulations=4")
TRAIN_METRICS = [
    "return_mean",
    "return_std",
    "success_rate",
    "valid_action_rate",
    "episode_length",
    "loss",
    "kl",
    "clip_frac",
    "token_entropy",
    "action_entropy",
    "zero_std_groups",
]
PERF_METRICS = ["env_steps_per_s", "rollout_s", "update_s", "rollout_tokens_per_s", "train_tokens_per_s"]


def command(
    arguments: Sequence[str], folder: Path, module: str = "msgrpo_lab.train", **settings: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command in `folder`, with no environment variables of the user's own but `settings`."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "OMP_NUM_THREADS", "TMPDIR")}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), **settings},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def succeeded(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main sweep on the tiny model, run from a folder that is not the project's; returns its outputs."""
    elsewhere, outputs = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("outputs")
    choices = ("sampler=uniform,abs_adv", "env=snake,frozenlake", *TINY, f"paths.outputs={outputs}")
    succeeded(command(["-m", *choices], elsewhere))
    assert list(elsewhere.iterdir()) == [], "nothing is written where the command was started"
    return outputs


@pytest.fixture(scope="module")
def client(sweep: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{sweep}/mlflow.db")


@pytest.fixture(scope="module")
def runs(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("msgrpo")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


@pytest.fixture(scope="module")
def jobs(runs: list[Run]) -> list[Run]:
    return [run for run in runs if "mlflow.parentRunId" in run.data.tags]


def test_a_sweep_is_one_finished_parent_with_four_finished_children(runs: list[Run], jobs: list[Run]) -> None:
    (parent,) = [run for run in runs if run not in jobs]
    assert [run.info.status for run in runs] == ["FINISHED"] * 5
    assert {run.data.tags["mlflow.parentRunId"] for run in jobs} == {parent.info.run_id}
    assert sorted((run.data.tags["sampler"], run.data.tags["env"]) for run in jobs) == [
        (sampler, env) for sampler in ("abs_adv", "uniform") for env in ("frozenlake", "snake")
    ]


def test_children_carry_the_tags_that_group_them(jobs: list[Run]) -> None:
    for run in jobs:
        tags = run.data.tags
        assert (tags["credit"], tags["model"], tags["seed"]) == ("episode_return", "tiny", "0")
        assert tags["mlflow.runName"] == f"{tags['env']}-{tags['sampler']}-episode_return-seed0"


@pytest.mark.parametrize("name", [*(f"train/{n}" for n in TRAIN_METRICS), *(f"perf/{n}" for n in PERF_METRICS),
                                  "sampler/ess", "sampler/inclusion_bias"])  # fmt: skip
def test_every_promised_metric_is_there_for_each_update(client: MlflowClient, jobs: list[Run], name: str) -> None:
    for run in jobs:
        history = client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in history] == [0, 1]


@pytest.mark.parametrize("name", ["return_mean", "success_rate", "normalised_score", "greedy_success_rate"])
def test_evaluation_metrics_are_there_for_start_and_end(client: MlflowClient, jobs: list[Run], name: str) -> None:
    for run in jobs:
        history = client.get_metric_history(run.info.run_id, f"eval/{run.data.tags['env']}/{name}")
        assert [point.step for point in history] == [0, 2]


def test_samplers_meet_the_same_first_rollout(client: MlflowClient, jobs: list[Run]) -> None:
    """An ablation compares like with like: one seed, one first rollout, whatever the sampler."""
    for env in ("frozenlake", "snake"):
        first = {
            client.get_metric_history(run.info.run_id, name)[0].value
            for run in jobs
            if run.data.tags["env"] == env
            for name in ("train/turns",)
        }
        assert len(first) == 1


@pytest.mark.parametrize(
    "path", ["config/resolved.yaml", "provenance/git.json", "provenance/packages.json", "adapter/best", "adapter/last"]
)
def test_artifacts_are_there(client: MlflowClient, jobs: list[Run], path: str) -> None:
    parent, _, name = path.rpartition("/")
    for run in jobs:
        assert name in {Path(item.path).name for item in client.list_artifacts(run.info.run_id, parent)}


def test_the_policies_can_be_had_from_the_tracking_store(client: MlflowClient, jobs: list[Run]) -> None:
    names = {Path(item.path).name for item in client.list_artifacts(jobs[0].info.run_id, "adapter/last")}
    assert {"config.json", "model.safetensors"} <= names


def test_figures_are_drawn_from_the_sweep(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    done = subprocess.run(
        [sys.executable, ROOT / "analysis/plots.py", "--tracking-uri", f"sqlite:///{sweep}/mlflow.db", "--out", out],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    succeeded(done)
    names = {path.name for path in out.iterdir() if path.stat().st_size > 0}
    figures = ["learning_curves", "final_comparison", "training_curves", "sampler_ablation", "score_against_optimal"]
    for figure in [*figures, "efficiency", "entropies", "diagnostics"]:
        assert {f"{figure}.{ending}" for ending in ("png", "pdf", "csv")} <= names
    assert {"table.md", "card.md"} <= names
    assert "FINISHED: 4 of 4 jobs finished" in (out / "card.md").read_text(encoding="utf-8")
    written = done.stdout.splitlines()
    assert written
    assert all(Path(line).is_file() for line in written)


def numbers(folder: Path) -> list[dict[str, str]]:
    """Rows of the run's CSV file without what measures time."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    return [{k: v for k, v in row.items() if not k.startswith("perf/") and not k.endswith("wall_s")} for row in rows]


def run_of_its_own(outputs: Path, *overrides: str, **settings: str) -> subprocess.CompletedProcess[str]:
    small = ("trainer.max_epochs=2", "rollout.num_groups=4", "rollout.group_size=4", "sampler.num_episodes=8")
    few = ("model=tiny", "logger=csv", "evaluation.episodes=8", "evaluation.every=1")
    # One thread: what several threads add up may depend on how many of them a busy machine grants.
    settings = {"OMP_NUM_THREADS": "1", **settings}
    return command([*few, *small, f"paths.outputs={outputs}", *overrides], outputs, **settings)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("single")
    done = succeeded(run_of_its_own(outputs, "sampler=abs_adv", "env=frozenlake_slippery"))
    assert "Traceback" not in done.stderr
    return outputs


def test_the_command_twice_with_one_seed_gives_identical_metrics(single: Path, tmp_path: Path) -> None:
    succeeded(run_of_its_own(tmp_path, "sampler=abs_adv", "env=frozenlake_slippery"))
    assert numbers(tmp_path) == numbers(single)
    assert any(row.get("train/loss") for row in numbers(single))


def test_a_run_keeps_its_policy_and_configuration_in_its_folder(single: Path) -> None:
    assert len(list(single.glob("runs/*/*/adapter/last/model.safetensors"))) == 1
    assert len(list(single.glob("runs/*/*/.hydra/config.yaml"))) == 1
    assert not (single / "mlflow.db").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_questions_are_answered_without_running(arguments: list[str], tmp_path: Path) -> None:
    done = succeeded(command(arguments, tmp_path))
    assert "num_groups: " in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["sampler=nosuch"], "msgrpo_lab: sampler=nosuch: "),
        (["-m", "sampler=uniform,nosuch"], "msgrpo_lab: sampler=nosuch: "),
        (["optim.lr=-1"], "msgrpo_lab: optim.lr=-1"),
        (["model.path=/no/such"], "msgrpo_lab: model.path=/no/such: "),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(arguments: list[str], beginning: str, tmp_path: Path) -> None:
    done = command([*arguments, f"paths.outputs={tmp_path}/outputs"], tmp_path)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith(beginning)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_is_marked_failed(tmp_path: Path) -> None:
    """A distribution that is not there is found only when the model is loaded."""
    wheel: dict[str, Any] = {"distribution": "no-such-model", "cache": tmp_path / "cache"}
    overrides = [f"model.source.{key}={value}" for key, value in wheel.items()]
    done = command([*overrides, "debug=one_update", f"paths.outputs={tmp_path}"], tmp_path)
    assert done.returncode != 0
    assert "model.source.distribution=no-such-model: not installed" in done.stderr
    if (tmp_path / "mlflow.db").exists():
        client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        experiment = client.get_experiment_by_name("msgrpo")
        assert experiment is not None
        assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FAILED"]


SWEEP = ("-m", "sampler=uniform,abs_adv")


@pytest.mark.parametrize(
    ("sweep_of", "signum"),
    [
        pytest.param((), signal.SIGINT, id="single"),
        pytest.param(SWEEP, signal.SIGINT, id="sweep"),
        pytest.param(SWEEP, signal.SIGTERM, id="sweep-SIGTERM", marks=pytest.mark.slow),
        # Three jobs for two workers: the third is handed to one of them when its first has stopped, and must not begin.
        pytest.param(
            ("-m", "seed=0,1,2", "launcher=joblib", "hydra.launcher.n_jobs=2"),
            signal.SIGTERM,
            id="joblib-SIGTERM",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_interrupted_run_ends_at_once_is_marked_killed_and_keeps_its_policy(
    sweep_of: tuple[str, ...], signum: signal.Signals, tmp_path: Path
) -> None:
    """A signal in the middle of training, to the process that was started."""
    running = 2 if "launcher=joblib" in sweep_of else 1
    arguments = [*sweep_of, *TINY, "trainer.max_epochs=100000", "evaluation.every=1", f"paths.outputs={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "msgrpo_lab.train", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  no threads here
    )
    assert process.stdout is not None
    try:
        told = ""
        for line in process.stdout:
            told += line
            if told.count("update 3/") == running:
                break
        process.send_signal(signum)
        told += process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + signum, told
    assert "Traceback" not in told
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("msgrpo")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    kinds = sorted(run.data.tags["msgrpo.kind"] for run in runs)
    assert kinds == ["job"] * running + ["sweep"] * bool(sweep_of), "no other job was begun"
    assert {run.info.status for run in runs} == {"KILLED"}
    for job in (run for run in runs if run.data.tags["msgrpo.kind"] == "job"):
        kept = {path.path for path in client.list_artifacts(job.info.run_id, "adapter")}
        assert kept == {"adapter/best", "adapter/last"}
