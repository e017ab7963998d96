"""The first moments of a training job: a store that refuses, and signals before anything is trained."""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from omegaconf import DictConfig, OmegaConf
from sqlalchemy.exc import OperationalError

from msgrpo_lab import train
from msgrpo_lab.runs.resume import Beginning
from msgrpo_lab.runs.stopping import Stopped
from msgrpo_lab.tracking import run as provenance
from msgrpo_lab.tracking.run import finish_run
from msgrpo_lab.tracking.tracking import CSVTracking


@pytest.fixture(autouse=True)
def _settings_of_the_process_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msgrpo_lab.training.heap.keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", fill)


def config(**logger: Any) -> DictConfig:
    return OmegaConf.create({"seed": 0, "resume": None, "logger": logger})


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("logger.experiment=x: the experiment is deleted; give another"), "logger.experiment=x: "),
        (MlflowException("no\nanswer"), "the tracking store cannot open a run (no); "),
        (
            OperationalError("select", {}, Exception("database is locked")),
            "the tracking store cannot open a run (",
        ),
        (sqlite3.OperationalError("database is locked"), "the tracking store cannot open a run (database is locked); "),
        (OSError(28, "No space left on device"), "the tracking store cannot open a run (No space left on device); "),
        (PermissionError(13, "Permission denied", "/a/file"), "[Errno 13] Permission denied: '/a/file'"),
    ],
)
def test_a_store_that_refuses_is_told_in_one_line(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(CSVTracking, "start", refuse)
    before = signal.getsignal(signal.SIGTERM)
    logger = config(_target_="msgrpo_lab.tracking.tracking.CSVTracking", folder=str(tmp_path))
    with pytest.raises(train.CannotStart) as ended:
        train._train(logger, tmp_path, Beginning(), {})
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"msgrpo_lab: {told}")
    assert list(tmp_path.iterdir()) == [], "no run is recorded that never began"
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_not_the_stores_stays_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **named: Any) -> None:
        raise KeyError("a mistake in the code")

    monkeypatch.setattr(CSVTracking, "start", broken)
    logger = config(_target_="msgrpo_lab.tracking.tracking.CSVTracking", folder=str(tmp_path))
    with pytest.raises(KeyError, match="a mistake in the code"):
        train._train(logger, tmp_path, Beginning(), {})


@pytest.mark.parametrize("moment", ["hardware"])
def test_a_signal_while_the_run_is_opened_marks_it_killed(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal came before")

    monkeypatch.setattr(provenance, moment, interrupted)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    logger = config(_target_="msgrpo_lab.tracking.tracking.MLflowTracking", tracking_uri=uri, log_system_metrics=False)
    try:
        with pytest.raises(Stopped) as stopped:
            train._train(logger, tmp_path / "run", Beginning(), {})
    finally:
        finish_run("FAILED")
    assert stopped.value.code == 130
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("msgrpo")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"


def test_an_interrupt_before_a_run_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "check_command_line", interrupted)
    with pytest.raises(SystemExit) as ended:
        train.main([])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "msgrpo_lab: interrupted\n"
