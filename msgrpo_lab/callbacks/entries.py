"""What is written to an MLflow run while it lasts, as values that can be kept on disk and delivered later.

Delivering an entry a second time changes nothing: MLflow tells a metric point apart by key, step, value and the time at
which it was measured, and the others replace what they find.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from mlflow import MlflowClient

POINTS_A_CALL = 1000
"""Metric points that MLflow takes in one call."""


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    time_ms: int
    """Milliseconds since 1970, when it was measured."""
    step: int


class Entry(Protocol):
    """One thing to write to a run."""

    def deliver(self, client: MlflowClient, run_id: str) -> None:
        """Writes it; whatever the store answers with is raised."""

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values; `entry_of` reads them."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Points of any metrics."""

    points: tuple[Point, ...]

    def deliver(self, client: MlflowClient, run_id: str) -> None:
        """Writes the points, as many at a time as MLflow takes."""
        from mlflow.entities import Metric

        for first in range(0, len(self.points), POINTS_A_CALL):
            part = self.points[first : first + POINTS_A_CALL]
            client.log_batch(run_id, metrics=[Metric(p.key, p.value, p.time_ms, p.step) for p in part])

    def as_json(self) -> dict[str, Any]:
        """JSON has no word for NaN and infinity: they are written as text."""
        rows = [[p.key, p.value if math.isfinite(p.value) else str(p.value), p.time_ms, p.step] for p in self.points]
        return {"kind": "metrics", "points": rows}


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file, or what a folder holds."""

    path: str
    """On this machine, absolute."""
    to: str
    """Folder among the run's artifacts."""

    def deliver(self, client: MlflowClient, run_id: str) -> None:
        """Copies it; one that is no longer there cannot be delivered by anybody and is left out."""
        path = Path(self.path)
        if path.is_dir():
            client.log_artifacts(run_id, self.path, self.to)
        elif path.is_file():
            client.log_artifact(run_id, self.path, self.to)

    def as_json(self) -> dict[str, Any]:
        """Path and target."""
        return {"kind": "artifact", "path": self.path, "to": self.to}


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag of the run."""

    key: str
    value: str

    def deliver(self, client: MlflowClient, run_id: str) -> None:
        """Sets it."""
        client.set_tag(run_id, self.key, self.value)

    def as_json(self) -> dict[str, Any]:
        """Key and value."""
        return {"kind": "tag", "key": self.key, "value": self.value}


@dataclass(frozen=True, slots=True)
class End:
    """The run's end."""

    status: str
    time_ms: int

    def deliver(self, client: MlflowClient, run_id: str) -> None:
        """Closes the run as it ended, at the time it ended."""
        client.set_terminated(run_id, self.status, self.time_ms)

    def as_json(self) -> dict[str, Any]:
        """Status and time."""
        return {"kind": "end", "status": self.status, "time_ms": self.time_ms}


def entry_of(value: Any) -> Entry:
    """The entry that `as_json` gave.

    Raises:
        ValueError: it is none.
    """
    try:
        match value["kind"]:
            case "metrics":
                rows = value["points"]
                return Metrics(tuple(Point(str(k), float(v), int(time), int(step)) for k, v, time, step in rows))
            case "artifact":
                return Artifact(str(value["path"]), str(value["to"]))
            case "tag":
                return Tag(str(value["key"]), str(value["value"]))
            case "end":
                return End(str(value["status"]), int(value["time_ms"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an entry of a run ({error})") from error
    raise ValueError(f"not an entry of a run (kind {value['kind']!r})")


def joined(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The same entries with neighbouring points put together: a call for many costs as much as a call for one."""
    points: list[Point] = []
    for entry in entries:
        if isinstance(entry, Metrics):
            points += entry.points
            continue
        if points:
            yield Metrics(tuple(points))
            points = []
        yield entry
    if points:
        yield Metrics(tuple(points))


def without_known(metrics: Metrics, known: Mapping[str, set[int]]) -> Metrics:
    """The points whose (key, step) is not among `known`, the steps that a run has of each key."""
    return Metrics(tuple(point for point in metrics.points if point.step not in known.get(point.key, ())))


def known_points(client: MlflowClient, run_id: str) -> dict[str, set[int]]:
    """The steps that the run has of each metric, without those of the machine's load (`system/…`)."""
    keys = [key for key in client.get_run(run_id).data.metrics if not key.startswith("system/")]
    return {key: {point.step for point in client.get_metric_history(run_id, key)} for key in keys}


def points_of(entries: Iterable[Entry]) -> list[Point]:
    """Every metric point among the entries."""
    return [point for entry in entries if isinstance(entry, Metrics) for point in entry.points]
