"""Tracked runs: parent and children, tags, parameters, artifacts, and how they end."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from omegaconf import DictConfig, OmegaConf
from sqlalchemy.exc import OperationalError

from msgrpo_lab.config import conf_dir
from msgrpo_lab.config.paths import code_checkout
from msgrpo_lab.runs.folder import note_failure
from msgrpo_lab.tracking.run import flatten, git_state, tags_of
from msgrpo_lab.tracking.sweep import SweepParent, swept_keys
from msgrpo_lab.tracking.tracking import PARENT_VARIABLE, CSVTracking, MLflowTracking, finish_run

ROOT = Path(__file__).parents[2]
PLANTED = "planted-value-55d0"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the module: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def tracking(uri: str) -> Iterator[MLflowTracking]:
    yield MLflowTracking(tracking_uri=uri, log_system_metrics=False)
    finish_run("KILLED")


def config(**values: Any) -> DictConfig:
    base = {"seed": 3, "base": 8, "sampler": {"_target_": "a.B", "alpha": 1.0, "n": "${base}"}}
    return OmegaConf.create({**base, **values})


def last_run(uri: str, run_id: str) -> Run:
    return MlflowClient(uri).get_run(run_id)


def artifact(uri: str, run_id: str, path: str) -> str:
    return Path(MlflowClient(uri).download_artifacts(run_id, path)).read_text()


def test_a_run_carries_configuration_and_origin(
    uri: str, tracking: MLflowTracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSGRPO_TEST_SECRET", PLANTED)
    logger: Any = tracking.start(config(engine={"api_key": PLANTED}))
    tracking.finish("FINISHED")
    run = last_run(uri, logger.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["sampler.n"] == "8", "interpolations are resolved"
    assert run.data.params["engine.api_key"] == "***"
    assert run.data.tags["msgrpo.kind"] == "job"
    assert run.data.tags["seed"] == "3"
    assert "mlflow.parentRunId" not in run.data.tags
    resolved = OmegaConf.create(artifact(uri, logger.run_id, "config/resolved.yaml"))
    assert resolved == {**config(engine={"api_key": "***"}), "sampler": {"_target_": "a.B", "alpha": 1.0, "n": 8}}
    assert json.loads(artifact(uri, logger.run_id, "provenance/hardware.json"))["cores"] >= 1
    assert "torch" in json.loads(artifact(uri, logger.run_id, "provenance/packages.json"))
    git = json.loads(artifact(uri, logger.run_id, "provenance/git.json"))
    assert run.data.tags["msgrpo.commit"] == (git["commit"] or "none")
    folder = Path(MlflowClient(uri).download_artifacts(logger.run_id, ""))
    assert not [path for path in folder.rglob("*") if path.is_file() and PLANTED in path.read_text()]


def test_the_commit_is_the_codes_own_wherever_outputs_go(
    uri: str, tracking: MLflowTracking, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Outputs may go to a repository of another project."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "other"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setenv("MSGRPO_ROOT", str(tmp_path))
    logger: Any = tracking.start(config())
    own = git_state(code_checkout()).commit
    other = git_state(tmp_path).commit
    assert other is not None
    assert last_run(uri, logger.run_id).data.tags["msgrpo.commit"] == (own or "none") != other


def test_lightnings_logger_writes_to_the_run_and_leaves_it_open(uri: str, tracking: MLflowTracking) -> None:
    logger: Any = tracking.start(config())
    logger.log_metrics({"train/return_mean": 0.5}, step=7)
    logger.finalize("success")
    run = last_run(uri, logger.run_id)
    assert run.info.status == "RUNNING", "evaluation and artifacts may follow the fit"
    (point,) = MlflowClient(uri).get_metric_history(logger.run_id, "train/return_mean")
    assert (point.value, point.step) == (0.5, 7)
    active = mlflow.active_run()
    assert active is not None
    assert active.info.run_id == logger.run_id, "traces attach to the same run"


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_as_it_is_told(uri: str, tracking: MLflowTracking, status: Any) -> None:
    logger: Any = tracking.start(config())
    tracking.finish(status)
    assert last_run(uri, logger.run_id).info.status == status
    assert mlflow.active_run() is None


def test_finishing_without_a_run_does_nothing(tracking: MLflowTracking) -> None:
    tracking.finish("FINISHED")
    assert mlflow.active_run() is None


def test_long_values_are_cut_and_whole_in_the_artifact(uri: str, tracking: MLflowTracking) -> None:
    long = "word " * 200
    logger: Any = tracking.start(config(prompt={"user": long}, **{f"key{n}": n for n in range(150)}))
    run = last_run(uri, logger.run_id)
    assert len(run.data.params["prompt.user"]) == 250
    assert run.data.params["prompt.user"].endswith("…")
    assert OmegaConf.create(artifact(uri, logger.run_id, "config/resolved.yaml")).prompt.user == long
    assert run.data.params["key149"] == "149", "more parameters than MLflow takes in one call"


def test_a_run_that_cannot_be_described_is_not_left_open(
    uri: str, tracking: MLflowTracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = MlflowClient(uri).get_experiment_by_name("msgrpo")
    before = (
        {run.info.run_id for run in MlflowClient(uri).search_runs([experiment.experiment_id])} if experiment else set()
    )
    with pytest.raises(Exception, match="nosuch"):
        tracking.start(config(bad="${nosuch.key}"))
    found = MlflowClient(uri).get_experiment_by_name("msgrpo")
    assert found is not None
    (new,) = [r for r in MlflowClient(uri).search_runs([found.experiment_id]) if r.info.run_id not in before]
    assert new.info.status == "FAILED"
    assert mlflow.active_run() is None


def test_only_the_first_process_opens_a_run(
    uri: str, tracking: MLflowTracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    tracking.start(config())
    assert mlflow.active_run() is None


@pytest.mark.parametrize(
    ("statuses", "told", "expected"),
    [
        (["FINISHED", "FINISHED"], "FINISHED", "FINISHED"),
        (["FINISHED", "FAILED"], "FINISHED", "FAILED"),
        (["FINISHED", None], "FINISHED", "FAILED"),
        (["FINISHED"], "FAILED", "FAILED"),
        ([], "FINISHED", "FINISHED"),
        (["FINISHED", "KILLED"], "FAILED", "KILLED"),
        (["FAILED", "KILLED"], "FAILED", "FAILED"),
    ],
)
def test_a_sweep_finishes_only_if_every_job_does(
    uri: str,
    tracking: MLflowTracking,
    monkeypatch: pytest.MonkeyPatch,
    statuses: list[Any],
    told: Any,
    expected: str,
) -> None:
    parent = tracking.start_sweep(["msgrpo_lab.train", "-m", "seed=1,2"], ["seed"])
    client = MlflowClient(uri)
    experiment_id = client.get_run(parent).info.experiment_id
    children = []
    for status in statuses:
        run = client.create_run(experiment_id, tags={"mlflow.parentRunId": parent})
        children.append(run.info.run_id)
        if status is not None:
            client.set_terminated(run.info.run_id, status)
    tracking.finish_sweep(parent, told)
    assert client.get_run(parent).info.status == expected
    ended = [client.get_run(child).info.status for child in children]
    assert ended == [status or "KILLED" for status in statuses], "a child without a process is not left running"


def test_children_lie_under_their_parent(uri: str, tracking: MLflowTracking, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tracking.start_sweep(["msgrpo_lab.train", "-m", "sampler=a,b", "engine.api_key=abc"], ["sampler"])
    monkeypatch.setenv(PARENT_VARIABLE, parent)
    ids = []
    for _ in range(2):
        logger: Any = tracking.start(config())
        ids.append(logger.run_id)
        tracking.finish("FINISHED")
    assert [last_run(uri, run_id).data.tags["mlflow.parentRunId"] for run_id in ids] == [parent, parent]
    tags = last_run(uri, parent).data.tags
    assert tags["msgrpo.kind"] == "sweep"
    assert tags["msgrpo.swept"] == "sampler"
    assert tags["msgrpo.command"] == "msgrpo_lab.train -m sampler=a,b engine.api_key=***"


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["sampler=a,b", "env=c", "seed=range(3)"], ["sampler", "seed"]),
        (["env=c"], []),
        (["++x.y=choice(1,2)"], ["x.y"]),
        (["x=[1,2]"], []),
    ],
)
def test_swept_keys(arguments: list[str], keys: list[str]) -> None:
    assert swept_keys(arguments) == keys


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["experiment=x"], ["sampler", "seed"]),
        (["experiment=x", "seed=3"], ["sampler"]),
        (["sampler=c,d", "env=e,f"], ["sampler", "seed", "env"]),
    ],
)
def test_a_presets_sweep_is_swept_unless_the_command_line_says_otherwise(arguments: list[str], keys: list[str]) -> None:
    assert swept_keys(arguments, {"sampler": "a,b", "seed": "0,1", "model": "tiny"}) == keys


def test_the_parent_names_the_keys_of_a_presets_sweep(uri: str, tmp_path: Path) -> None:
    cfg = sweep_config(tmp_path, _target_="msgrpo_lab.tracking.tracking.MLflowTracking", tracking_uri=uri)
    cfg.hydra.sweeper = {"params": {"sampler": "uniform,abs_adv", "seed": "0,1,2"}}
    callback = SweepParent()
    callback.on_multirun_start(cfg)
    parent = os.environ[PARENT_VARIABLE]
    callback.on_multirun_end(cfg)
    assert last_run(uri, parent).data.tags["msgrpo.swept"] == "sampler,seed"


def sweep_config(folder: Path, /, **logger: Any) -> DictConfig:
    hydra = {
        "overrides": {"task": ["seed=1,2"], "hydra": []},
        "job": {"config_name": "train"},
        "sweep": {"dir": str(folder / "sweep")},
    }
    return OmegaConf.create({"logger": logger, "paths": {"outputs": str(folder)}, "hydra": hydra})


def test_the_parent_travels_in_the_environment_until_the_sweep_ends(uri: str, tmp_path: Path) -> None:
    cfg = sweep_config(tmp_path, _target_="msgrpo_lab.tracking.tracking.MLflowTracking", tracking_uri=uri)
    callback = SweepParent()
    callback.on_multirun_start(cfg)
    parent = os.environ[PARENT_VARIABLE]
    assert last_run(uri, parent).info.status == "RUNNING"
    callback.on_multirun_end(cfg)
    assert PARENT_VARIABLE not in os.environ
    assert last_run(uri, parent).info.status == "FINISHED"


def test_a_store_that_cannot_be_used_ends_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = sweep_config(
        tmp_path, _target_="msgrpo_lab.tracking.tracking.MLflowTracking", tracking_uri="sqlite:////proc/x/y.db"
    )
    with pytest.raises(SystemExit) as caught:
        SweepParent().on_multirun_start(cfg)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("msgrpo_lab: logger.tracking_uri=sqlite:////proc/x/y.db: ")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_wrong_logger_ends_the_program_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = sweep_config(tmp_path, _target_="msgrpo_lab.tracking.tracking.MLflowTracking", tracking_uri="./mlruns")
    with pytest.raises(SystemExit):
        SweepParent().on_multirun_start(cfg)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("msgrpo_lab: logger.tracking_uri=./mlruns: the address is a folder")


def test_a_sweep_that_was_left_goes_on_under_its_parent(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = sweep_config(tmp_path, _target_="msgrpo_lab.tracking.tracking.MLflowTracking", tracking_uri=uri)
    killed = SweepParent()
    killed.on_multirun_start(cfg)
    parent = os.environ[PARENT_VARIABLE]
    with pytest.raises(SystemExit):
        SweepParent().on_multirun_start(cfg)  # the first one is still at it
    killed._held.close()  # as the end of its process does
    atexit.unregister(killed._close)
    MlflowClient(uri).set_terminated(parent, "KILLED")
    elsewhere = OmegaConf.merge(cfg, {"hydra": {"sweep": {"dir": str(tmp_path / "another")}}})
    fresh = SweepParent()
    fresh.on_multirun_start(elsewhere)
    assert os.environ[PARENT_VARIABLE] != parent
    assert "add resume=auto" in caplog.text
    fresh.on_multirun_end(elsewhere)
    resumed = SweepParent()
    resumed.on_multirun_start(cfg)
    assert os.environ[PARENT_VARIABLE] == parent
    assert last_run(uri, parent).info.status == "RUNNING"
    resumed.on_multirun_end(cfg)
    assert last_run(uri, parent).info.status == "FINISHED"


def test_a_sweep_ends_with_the_jobs_that_failed(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = sweep_config(tmp_path, _target_="msgrpo_lab.tracking.tracking.MLflowTracking", tracking_uri=uri)
    callback = SweepParent()
    callback.on_multirun_start(cfg)
    parent = os.environ[PARENT_VARIABLE]
    for job, reason in (("10_b", "the disk is full"), ("2_a", None), ("3_c", "no such\nmodel")):
        (tmp_path / "sweep" / job).mkdir()
        note_failure(tmp_path / "sweep" / job, reason)
    with pytest.raises(SystemExit) as ended:
        callback.on_multirun_end(cfg)
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "msgrpo_lab: job 3_c failed: no such model",
        "msgrpo_lab: job 10_b failed: the disk is full",
    ]
    assert last_run(uri, parent).info.status == "FAILED"


@pytest.mark.parametrize(
    "error",
    [
        MlflowException("no answer\nat all"),
        OperationalError("select", {}, Exception("no answer")),
        OSError("no answer"),
    ],
)
@pytest.mark.parametrize("failed", [True, False])
def test_a_store_that_fails_at_the_end_hides_no_failed_job(
    error: Exception, failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(CSVTracking, "start_sweep", lambda *_: "a-parent")
    monkeypatch.setattr(CSVTracking, "finish_sweep", fail)
    cfg = sweep_config(tmp_path, _target_="msgrpo_lab.tracking.tracking.CSVTracking", folder=str(tmp_path))
    hydra = Callbacks()  # which swallows what is no SystemExit
    hydra.callbacks.append(SweepParent())
    hydra.on_multirun_start(cfg)
    assert os.environ[PARENT_VARIABLE] == "a-parent"
    if failed:
        (tmp_path / "sweep/2_a").mkdir()
        note_failure(tmp_path / "sweep/2_a", "the disk is full")
        with pytest.raises(SystemExit) as ended:
            hydra.on_multirun_end(cfg)
        assert ended.value.code == 1
    else:
        hydra.on_multirun_end(cfg)
    *jobs, store = capsys.readouterr().err.splitlines()
    assert jobs == ["msgrpo_lab: job 2_a failed: the disk is full"] * failed
    assert store.startswith(f"msgrpo_lab: {tmp_path}/sweep: the sweep could not be closed (")
    assert "no answer" in store
    assert PARENT_VARIABLE not in os.environ


def test_a_store_that_fails_at_the_start_of_a_sweep_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> None:
        raise MlflowException("no answer")

    monkeypatch.setattr(CSVTracking, "start_sweep", fail)
    cfg = sweep_config(tmp_path, _target_="msgrpo_lab.tracking.tracking.CSVTracking", folder=str(tmp_path))
    hydra = Callbacks()
    hydra.callbacks.append(SweepParent())
    with pytest.raises(SystemExit) as ended:
        hydra.on_multirun_start(cfg)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("msgrpo_lab: the tracking store cannot open a run (no answer); ")


def test_a_sweep_without_a_database_has_no_parent(tmp_path: Path) -> None:
    cfg = sweep_config(tmp_path, _target_="msgrpo_lab.tracking.tracking.CSVTracking", folder=str(tmp_path))
    callback = SweepParent()
    callback.on_multirun_start(cfg)
    assert PARENT_VARIABLE not in os.environ
    callback.on_multirun_end(cfg)


def test_csv_tracking_is_made_where_no_job_runs_as_a_sweeps_parent_is() -> None:
    tracking = instantiate(OmegaConf.load(conf_dir() / "logger" / "csv.yaml"))
    assert tracking == CSVTracking()
    assert tracking.start_sweep([], []) is None


def test_csv_tracking_writes_metrics_and_configuration(tmp_path: Path) -> None:
    tracking = CSVTracking(folder=str(tmp_path / "run"))
    logger = tracking.start(config())
    logger.log_metrics({"train/loss": 0.5}, step=1)
    assert "train/loss" in (tmp_path / "run/csv/metrics.csv").read_text(), "a kill would lose nothing"
    tracking.finish("FINISHED")
    assert OmegaConf.load(tmp_path / "run/resolved.yaml").sampler.n == 8


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"tracking_uri": "./mlruns"}, "logger.tracking_uri=./mlruns"),
        ({"tracking_uri": "sqlite:///x.db", "experiment": " "}, "logger.experiment=' '"),
        ({"tracking_uri": "sqlite:///x.db", "system_metrics_interval": 0}, "logger.system_metrics_interval=0"),
    ],
)
def test_wrong_values_are_refused_at_construction(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match="; ") as caught:
        MLflowTracking(**values)
    assert str(caught.value).startswith(f"{key}: ")


def test_tags_are_the_choices_of_the_groups(tmp_path: Path) -> None:
    for group in ("env", "sampler", "other"):
        (tmp_path / group).mkdir()
        (tmp_path / group / "one.yaml").write_text("x: 1")
    (tmp_path / "main.yaml").write_text("defaults: [_self_, {env: one}, {sampler: one}, {other: one}]\nseed: 5")
    state = HydraConfig.instance().cfg
    try:
        with initialize_config_dir(config_dir=str(tmp_path), version_base="1.3"):
            cfg = compose("main", return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        assert tags_of(cfg) == {"msgrpo.kind": "job", "env": "one", "sampler": "one", "seed": "5"}
    finally:
        HydraConfig.instance().cfg = state


def test_flattening() -> None:
    tree = {"a": {"b": 1, "c": {"d": None}}, "e": [1, {"f": 2}], "g": {}}
    assert dict(flatten(tree)) == {"a.b": 1, "a.c.d": None, "e": [1, {"f": 2}]}


PROGRAM = """
import hydra
from hydra.utils import instantiate

@hydra.main(version_base="1.3", config_path="conf", config_name="main")
def main(cfg):
    tracking = instantiate(cfg.logger)
    logger = tracking.start(cfg)
    try:
        if cfg.fail == cfg.seed:
            raise RuntimeError("broken on purpose")
        logger.log_metrics({"x": float(cfg.seed)}, step=0)
    except BaseException:
        tracking.finish("FAILED")
        raise
    tracking.finish("FINISHED")

main()
"""


@pytest.mark.parametrize(
    ("launcher", "fail", "parent_status", "child_statuses"),
    [
        ("basic", 0, "FINISHED", ["FINISHED", "FINISHED"]),
        ("joblib", 1, "FAILED", ["FAILED", "FINISHED"]),
        pytest.param("basic", 1, "FAILED", ["FAILED", "FINISHED"], marks=pytest.mark.slow),
        pytest.param("joblib", 0, "FINISHED", ["FINISHED", "FINISHED"], marks=pytest.mark.slow),
    ],
)
def test_a_real_sweep_is_one_parent_with_a_child_a_job(
    tmp_path: Path, launcher: str, fail: int, parent_status: str, child_statuses: list[str]
) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "conf/main.yaml").write_text(
        textwrap.dedent(f"""\
        defaults: [_self_, override hydra/launcher: {launcher}]
        seed: 0
        fail: {fail}
        paths: {{outputs: {tmp_path}/outputs}}
        logger:
          _target_: msgrpo_lab.tracking.tracking.MLflowTracking
          tracking_uri: sqlite:///{tmp_path}/outputs/mlflow.db
          log_system_metrics: false
        hydra: {{callbacks: {{tracking: {{_target_: msgrpo_lab.tracking.sweep.SweepParent}}}}}}
        """)
    )
    done = subprocess.run(
        [sys.executable, "program.py", "-m", "seed=1,2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert (done.returncode == 0) is (fail == 0), done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("msgrpo")
    assert experiment is not None, done.stderr
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["msgrpo.kind"] == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 3
    assert parent.info.status == parent_status, done.stderr
    assert sorted(child.info.status for child in children) == child_statuses
    assert sorted(child.data.params["seed"] for child in children) == ["1", "2"]
    assert parent.data.tags["msgrpo.swept"] == "seed"
