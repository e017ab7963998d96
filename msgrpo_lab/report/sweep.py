"""What MLflow holds of a sweep: its parent run, its jobs and their metrics, for the card and for figures."""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KIND = "msgrpo.kind"
PARENT = "mlflow.parentRunId"
CARD = "card.md"
HOW_TO_MAKE = "make one with `make sweep`"


class TrackingError(Exception):
    """Asked for something that the tracking store does not hold; the message is one line and says what to do."""


def _check_sqlite(tracking_uri: str) -> None:
    """Refuse a database that is not there, before MLflow would create it.

    Raises:
        TrackingError: no such file, or a file that is not an MLflow database.
    """
    prefix = "sqlite:///"
    if not tracking_uri.startswith(prefix):
        return
    path = Path(tracking_uri.removeprefix(prefix).split("?")[0])
    if not path.is_file():
        raise TrackingError(f"tracking uri '{tracking_uri}': no database at {path}; {HOW_TO_MAKE}")
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
    except sqlite3.DatabaseError as error:
        raise TrackingError(
            f"tracking uri '{tracking_uri}': {path} is not readable ({error}); {HOW_TO_MAKE}"
        ) from error
    finally:
        connection.close()
    if not {"experiments", "runs", "metrics"} <= tables:
        raise TrackingError(f"tracking uri '{tracking_uri}': {path} holds no MLflow tables; {HOW_TO_MAKE}")


def open_client(tracking_uri: str) -> MlflowClient:
    """A client of a store that is there.

    Raises:
        TrackingError: no database, or an address that MLflow refuses.
    """
    _check_sqlite(tracking_uri)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with one_line(tracking_uri):
        return MlflowClient(tracking_uri)


@contextmanager
def one_line(tracking_uri: str) -> Iterator[None]:
    """What MLflow raises becomes a `TrackingError`."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise TrackingError(f"tracking uri '{tracking_uri}': {str(error).splitlines()[0]}") from error


class Runs:
    """The runs of one experiment.

    Raises:
        TrackingError: no database, no such experiment, or a store that MLflow cannot read.
    """

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        """Opens the store; nothing is made."""
        self.client = open_client(tracking_uri)
        self.experiment, self._uri = experiment, tracking_uri
        with one_line(tracking_uri):
            found = self.client.get_experiment_by_name(experiment)
        if found is None:
            raise TrackingError(f"experiment '{experiment}' is not in {tracking_uri}; {HOW_TO_MAKE}")
        self._experiment_id = found.experiment_id

    def search(self, filter_string: str) -> list[Run]:
        """All runs that match, oldest first."""
        runs: list[Run] = []
        token: str | None = None
        with one_line(self._uri):
            while True:
                page = self.client.search_runs(
                    [self._experiment_id],
                    filter_string,
                    max_results=1000,
                    order_by=["attributes.start_time ASC"],
                    page_token=token,
                )
                runs.extend(page)
                token = page.token
                if not token:
                    return runs


def copy_cards(tracking_uri: str, sweeps: Sequence[str], out: Path) -> list[Path]:
    """Copy the sweeps' experiment cards to `out`, as `card.md`, or `card-<sweep>.md` where there are several sweeps.

    Returns:
        The files written. A sweep without a card is named in a warning that says how to make one.
    """
    client, paths = open_client(tracking_uri), []
    for sweep in sweeps:
        with one_line(tracking_uri):
            kept = any(artifact.path == CARD for artifact in client.list_artifacts(sweep))
        if not kept:
            log.warning("sweep %s has no card: make it with python -m msgrpo_lab.report.card %s", sweep, sweep)
            continue
        paths.append(out / (CARD if len(sweeps) == 1 else f"card-{sweep}.md"))
        with tempfile.TemporaryDirectory() as folder, one_line(tracking_uri):
            copied = Path(client.download_artifacts(sweep, CARD, folder))
            paths[-1].write_text(copied.read_text(encoding="utf-8"), encoding="utf-8")
    return paths


Points = Sequence[tuple[int, float]]
"""(step, value), in the order of steps."""

_WANTED = re.compile(
    r"eval/[^/]+/(greedy_)?(return_mean|success_rate|normalised_score|episode_length)"
    r"|train/(episode_length|turns|completion_tokens)|perf/(credit_s|evaluation_s|train_flops)"
)
"""Metrics whose whole history is read; of all others the last value is enough."""
_IDENTITY = re.compile(
    r"^(paths|logger|callbacks|checkpoint)\.|(^|[._])(seed|run_id|run_name|dir|ckpt_path|resume|job_num|job_id)$"
)
"""Parameters that tell two jobs of one setting apart, and are no setting themselves."""
_GROUPS = ("env", "sampler", "credit", "model", "prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One job of a sweep."""

    run_id: str
    name: str
    status: str
    duration_s: float | None
    """From start to end; None while it runs."""
    tags: Mapping[str, str]
    params: Mapping[str, str]
    last: Mapping[str, float]
    """Every metric's last value."""
    history: Mapping[str, Points]
    """The metrics that a card needs all values of."""
    hardware: Mapping[str, Any]
    packages: Mapping[str, str]
    dirty: bool
    """Tracked files differed from the commit."""

    @property
    def seed(self) -> str:
        """The job's seed, as text."""
        return self.tags.get("seed", "")

    def total(self, metric: str) -> float | None:
        """The sum of a metric's values; None where it was not logged."""
        points = self.history.get(metric)
        return sum(value for _, value in points) if points else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRecord:
    """A parent run and its jobs, oldest first."""

    run_id: str
    name: str
    status: str
    start_ms: int
    end_ms: int | None
    tags: Mapping[str, str]
    jobs: Sequence[JobRecord]

    @property
    def finished(self) -> list[JobRecord]:
        """The jobs that ended as they should."""
        return [job for job in self.jobs if job.status == "FINISHED"]

    def cells(self) -> dict[tuple[str, str], list[JobRecord]]:
        """(environment, method) → its finished jobs, which differ in the seed alone.

        A method is the sampler, plus whatever else differs between the jobs; so two settings are never taken for two
        seeds of one.
        """
        jobs = self.finished
        shown = [group for group in _GROUPS[2:] if len({job.tags.get(group, "") for job in jobs}) > 1]
        by_choice: dict[tuple[str, ...], list[JobRecord]] = {}
        for job in jobs:
            by_choice.setdefault(tuple(job.tags.get(group, "") for group in _GROUPS), []).append(job)
        keys = {key for job in jobs for key in job.params if not _IDENTITY.search(key)}
        varying = sorted(
            key for key in keys if any(len({job.params.get(key) for job in some}) > 1 for some in by_choice.values())
        )
        found: dict[tuple[str, str], list[JobRecord]] = {}
        for job in jobs:
            parts = [job.tags.get("sampler", ""), *(job.tags.get(group, "") for group in shown)]
            parts += [f"{key}={job.params.get(key, '')}" for key in varying]
            found.setdefault((job.tags.get("env", ""), ", ".join(parts)), []).append(job)
        return found


def read_sweep(client: MlflowClient, sweep: str) -> SweepRecord:
    """Everything a card needs, from MLflow alone.

    Args:
        client: of the tracking store.
        sweep: the parent run's id.

    Raises:
        MlflowException: the store cannot be read, or has no such run.
        ValueError: the run is no sweep's parent.
    """
    parent = client.get_run(sweep)
    if parent.data.tags.get("msgrpo.kind") != "sweep":
        raise ValueError(f"sweep={sweep}: that run is no sweep's parent; give the id of a run tagged msgrpo.kind=sweep")
    chosen = f"tags.`mlflow.parentRunId` = '{sweep}' and tags.`msgrpo.kind` = 'job'"
    order, jobs, token = ["attributes.start_time ASC"], [], None
    while True:
        page = client.search_runs(
            [parent.info.experiment_id], chosen, max_results=1000, order_by=order, page_token=token
        )
        jobs += [_job(client, run) for run in page]
        token = page.token
        if not token:
            break
    return SweepRecord(
        run_id=sweep,
        name=parent.info.run_name or "sweep",
        status=parent.info.status,
        start_ms=parent.info.start_time,
        end_ms=parent.info.end_time,
        tags=dict(parent.data.tags),
        jobs=jobs,
    )


def _job(client: MlflowClient, run: Run) -> JobRecord:
    info = run.info
    history = {}
    for key in run.data.metrics:
        if _WANTED.fullmatch(key):
            by_step = {point.step: float(point.value) for point in client.get_metric_history(info.run_id, key)}
            history[key] = sorted(by_step.items())
    return JobRecord(
        run_id=info.run_id,
        name=info.run_name or info.run_id,
        status=info.status,
        duration_s=None if info.end_time is None else (info.end_time - info.start_time) / 1000.0,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        last={key: float(value) for key, value in run.data.metrics.items()},
        history=history,
        hardware=_provenance(client, run, "hardware.json"),
        packages=_provenance(client, run, "packages.json"),
        dirty=bool(_provenance(client, run, "git.json").get("dirty")),
    )


def _provenance(client: MlflowClient, run: Run, name: str) -> dict[str, Any]:
    """One file of a run's `provenance/`; empty where the run ended before it was written."""
    path = f"provenance/{name}"
    if not any(artifact.path == path for artifact in client.list_artifacts(run.info.run_id, "provenance")):
        return {}
    # A local file is read where it lies: MLflow copies in threads, and an interrupted program that is ending, which is
    # when the card of its sweep is made, can start none.
    place = urlsplit(run.info.artifact_uri)
    if place.scheme in ("", "file"):
        text = (Path(url2pathname(place.path)) / path).read_text(encoding="utf-8")
    else:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(client.download_artifacts(run.info.run_id, path, folder)).read_text(encoding="utf-8")
    content = json.loads(text)
    return dict(content)


log = logging.getLogger(__name__)

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
