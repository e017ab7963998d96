"""MLflow → tidy tables: one row a job, one row a logged number. Nothing is written, and no database is created.

A sweep is one parent run (tag `msgrpo.kind=sweep`) with a child a job (`msgrpo.kind=job`, `mlflow.parentRunId`);
a single training run is a job without a parent.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.store import HOW_TO_MAKE, KIND, PARENT, Runs, TrackingError, one_line, open_client

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger("analysis.load")

JOB_TAGS = ("env", "sampler", "credit", "model", "prompt", "seed")
PREFIXES = ("train/", "eval/", "sampler/", "credit/", "reference/", "perf/")
LATEST = "latest"
NO_PARENT = "none"


def _sweep_ids(store: Runs, sweep: str) -> list[str]:
    """Parent run ids that `sweep` names: the newest finished one for "latest", else a comma-separated list."""
    experiment = store.experiment
    parents = {run.info.run_id: run for run in store.search(f"tags.`{KIND}` = 'sweep'")}
    if sweep == LATEST:
        finished = [run_id for run_id, run in parents.items() if run.info.status == "FINISHED"]
        if finished:
            newest = list(parents)[-1]
            if newest != finished[-1]:
                status = parents[newest].info.status
                log.warning("the newest sweep, %s, is %s: the one before it that finished is drawn", newest, status)
            return finished[-1:]
        if parents:
            run_id, run = list(parents.items())[-1]
            raise TrackingError(
                f"experiment '{experiment}' has no finished sweep; "
                f"the newest is {run.info.status}: draw its finished jobs with --sweep {run_id}"
            )
        raise TrackingError(
            f"experiment '{experiment}' has no sweep; {HOW_TO_MAKE}, or draw single runs with --sweep {NO_PARENT}"
        )
    ids = [part.strip() for part in sweep.split(",") if part.strip()]
    if not ids:
        raise TrackingError(f"sweep '{sweep}' names no run: give a parent run id, '{LATEST}' or '{NO_PARENT}'")
    for run_id in ids:
        if run_id not in parents:
            known = ", ".join(list(parents)[-3:]) or "none"
            raise TrackingError(f"sweep '{run_id}' is not in experiment '{experiment}'; newest sweeps: {known}")
    return list(dict.fromkeys(ids))


def _row(run: Run) -> dict[str, Any]:
    tags, info = run.data.tags, run.info
    end = info.end_time
    return {
        "run_id": info.run_id,
        "sweep": tags.get(PARENT, ""),
        "name": info.run_name,
        **{tag: tags.get(tag, "") for tag in JOB_TAGS},
        "status": info.status,
        "start": pd.Timestamp(info.start_time, unit="ms", tz="UTC"),
        "duration_s": (end - info.start_time) / 1000.0 if end else np.nan,
    }


def _varying_params(runs: Sequence[Run]) -> pd.DataFrame:
    """Logged parameters that differ between the runs, as columns `param.<key>`; "" where a run did not log one."""
    table = pd.DataFrame([dict(run.data.params) for run in runs]).reindex(range(len(runs)))
    table = table.astype(object).where(table.notna(), "")
    varying = sorted(key for key in table.columns if table[key].nunique() > 1)
    return table[varying].rename(columns={key: f"param.{key}" for key in varying})


def load_runs(tracking_uri: str, experiment: str = "msgrpo", sweep: str = LATEST) -> pd.DataFrame:
    """The jobs of a sweep, one row each, oldest first, whatever their status.

    Args:
        tracking_uri: MLflow tracking address, such as `sqlite:///outputs/mlflow.db`.
        experiment: experiment name.
        sweep: "latest" (the newest finished sweep), one or several parent run ids (comma-separated), or "none"
            (every job that has no parent).

    Returns:
        Columns run_id, sweep (parent id or ""), name, env, sampler, credit, model, prompt, seed (text, "" where the tag
        is missing), status, start (UTC), duration_s (nan while running), and `param.<key>` for each parameter that
        differs between the jobs.

    Raises:
        TrackingError: no database, no such experiment or sweep, or no finished job in it.
    """
    store = Runs(tracking_uri, experiment)
    jobs = f"tags.`{KIND}` = 'job'"
    if sweep == NO_PARENT:
        runs = [run for run in store.search(jobs) if not run.data.tags.get(PARENT)]
    else:
        parents = _sweep_ids(store, sweep)
        runs = [run for parent in parents for run in store.search(f"{jobs} and tags.`{PARENT}` = '{parent}'")]
    if not any(run.info.status == "FINISHED" for run in runs):
        states = ", ".join(sorted({run.info.status for run in runs})) or "no jobs at all"
        raise TrackingError(f"sweep '{sweep}' has no finished jobs ({states}); wait for one, or {HOW_TO_MAKE}")
    return pd.concat([pd.DataFrame([_row(run) for run in runs]), _varying_params(runs)], axis=1)


def keep_finished(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished jobs that can be told apart; each one left out is named in a warning.

    Left out are jobs that are not FINISHED, and jobs without an `env` or a `sampler` tag.
    """
    keep = []
    for row in runs.itertuples():
        missing = [tag for tag in ("env", "sampler") if not getattr(row, tag)]
        if row.status != "FINISHED":
            log.warning(
                "left out: job %s (%s, %s, seed %s) is %s", row.name, row.env, row.sampler, row.seed, row.status
            )
        elif missing:
            log.warning("left out: job %s has no tag '%s'", row.name, missing[0])
        keep.append(row.status == "FINISHED" and not missing)
    return runs[keep].reset_index(drop=True)


def load_metrics(tracking_uri: str, run_ids: Sequence[str], prefixes: Sequence[str] = PREFIXES) -> pd.DataFrame:
    """Every logged number of the runs.

    Args:
        tracking_uri: MLflow tracking address.
        run_ids: runs to read.
        prefixes: metric names are kept if they start with one of these (system metrics are many and are not).

    Returns:
        Columns run_id, metric, step, value, time (UTC), sorted by the first three. A metric logged twice for a step
        appears once: the later value wins. Infinities, which SQL stores as the largest double, are infinite again.

    Raises:
        TrackingError: no database, or a run that is not in it.
    """
    client = open_client(tracking_uri)
    rows: list[tuple[str, str, int, float, int]] = []
    with one_line(tracking_uri):
        for run_id in run_ids:
            for key in client.get_run(run_id).data.metrics:
                if key.startswith(tuple(prefixes)):
                    history = client.get_metric_history(run_id, key)
                    rows.extend((run_id, key, point.step, point.value, point.timestamp) for point in history)
    table = pd.DataFrame(rows, columns=["run_id", "metric", "step", "value", "time"])
    table = table.sort_values(["run_id", "metric", "step", "time"], kind="stable")
    table = table.drop_duplicates(["run_id", "metric", "step"], keep="last").reset_index(drop=True)
    value_N = table["value"].to_numpy(dtype=np.float64)
    table["value"] = np.where(np.abs(value_N) >= sys.float_info.max, np.copysign(np.inf, value_N), value_N)
    table["time"] = pd.to_datetime(table["time"], unit="ms", utc=True)
    return table
