"""What MLflow holds of a sweep: its parent run and its jobs, with the numbers that a card tells."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

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
