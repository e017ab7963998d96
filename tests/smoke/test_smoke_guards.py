"""A run that its watchdog stops, as a real command: code, line, tag, status, and what is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
STOPPING = (
    "debug=fast",
    "trainer.max_epochs=5",
    "evaluation.reference_simulations=4",
    "logger.log_system_metrics=false",
    "callbacks.watchdogs.collapse=stop",
    "callbacks.watchdogs.patience=2",
    "callbacks.watchdogs.min_action_entropy=9",
)


def test_a_stopped_run_keeps_what_it_has_and_says_why(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR")}
    done = subprocess.run(
        [sys.executable, "-m", "msgrpo_lab.train", *STOPPING, f"hydra.run.dir={tmp_path}/run"],
        cwd=tmp_path,
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MSGRPO_ROOT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 3, done.stderr[-3000:]
    (line,) = done.stderr.splitlines()
    assert line.startswith("msgrpo_lab: callbacks.watchdogs.collapse=stop: train/action_entropy=1.")
    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("msgrpo")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert line == f"msgrpo_lab: {run.data.tags['msgrpo.stopped_by']}"
    assert (tmp_path / "run/checkpoints/update-00000001/manifest.json").is_file()
    assert (tmp_path / "run/adapter/last").is_dir()
