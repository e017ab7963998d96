"""Eight jobs at once into one database: every point that was logged is there, once, with its value."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOBS, UPDATES, KEYS = 8, 40, 60
PROGRAM = """
import json, os, sys
from pathlib import Path
from omegaconf import OmegaConf
import lightning.pytorch.loggers, sqlalchemy  # before the fork: a start costs seconds
from msgrpo_lab.tracking.database import mlflow_module
from msgrpo_lab.tracking.tracking import MLflowTracking
mlflow_module()
uri, jobs, updates, keys = sys.argv[1], *map(int, sys.argv[2:])
waiting, go = os.pipe()
children = []
for job in range(jobs):
    child = os.fork()
    if child:
        children.append(child)
        continue
    os.close(go)
    os.read(waiting, 1)  # until all are there
    folder = Path(f"job{job}")
    folder.mkdir()
    os.chdir(folder)
    tracking = MLflowTracking(tracking_uri=uri, log_system_metrics=False)
    logger = tracking.start(OmegaConf.create({"seed": job}))
    points = 0
    for step in range(updates):
        metrics = {f"train/m{key}": job + step / 64 + key / 4096 for key in range(keys)}
        logger.log_metrics(metrics, step)
        points += len(metrics)
    tracking.finish("FINISHED")
    Path("logged.json").write_text(json.dumps({"run_id": logger.run_id, "points": points}))
    os._exit(0)
os.close(waiting)
os.close(go)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_eight_jobs_at_once_lose_no_metric(tmp_path: Path) -> None:
    database = tmp_path / "outputs" / "mlflow.db"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"sqlite:///{database}", *map(str, (JOBS, UPDATES, KEYS))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logged = [json.loads((tmp_path / f"job{job}" / "logged.json").read_text()) for job in range(JOBS)]
    assert sum(job["points"] for job in logged) == JOBS * UPDATES * KEYS
    assert not list(tmp_path.rglob("spool-*.jsonl")), "nothing waits"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        found = connection.execute("SELECT run_uuid, key, step, value FROM metrics").fetchall()
        status = connection.execute("SELECT DISTINCT status FROM runs").fetchall()
    expected = {
        (job["run_id"], f"train/m{key}", step, number + step / 64 + key / 4096)
        for number, job in enumerate(logged)
        for step in range(UPDATES)
        for key in range(KEYS)
    }
    assert len(found) == len(expected) == JOBS * UPDATES * KEYS, "none lost, none twice"
    assert set(found) == expected
    assert status == [("FINISHED",)]
