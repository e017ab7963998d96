"""What a run logs on its way to the tracking store: written at once, or kept on disk until the store answers again."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from msgrpo_lab.files import sync, write_durably
from msgrpo_lab.messages import mask
from msgrpo_lab.tracking.database import reason_of, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

SPOOLS = "spool-*.jsonl"
"""How the files are named, with the run's id: a folder that two runs were made in has one for each."""


class Owner(NamedTuple):
    """The run that a spool belongs to: its first line."""

    tracking_uri: str
    """Without a password."""
    run_id: str


class Spool:
    """An append-only file of entries, each on disk (fsync) when `append` returns.

    What a process that died left half-written at the end is cut off before the next line is appended; its update is
    made again when the run is resumed. The file is there only while something waits in it.

    Args:
        folder: of the run.
        owner: the run.
    """

    def __init__(self, folder: Path, owner: Owner) -> None:
        self.path = folder / SPOOLS.replace("*", owner.run_id)
        self.owner = owner
        self._end: int | None = None
        """Bytes of whole lines in the file; None before the first look at it."""

    def append(self, entry: Entry) -> None:
        """Adds an entry.

        Raises:
            OSError: it could not be written; what stood in the file before is as it was.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        end = 0 if new else _whole_lines(self.path) if self._end is None else self._end
        lines = _line(entry.as_json())
        if end == 0:
            lines = self._first_line() + lines
        # Unbuffered: a buffer would write the rest of a line that failed when the file is closed.
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.ftruncate(file, end)
            _write_all(file, lines)
            os.fsync(file)
        except OSError:
            os.ftruncate(file, end)
            raise
        finally:
            os.close(file)
        if new:
            sync(self.path.parent)
        self._end = end + len(lines)

    def entries(self) -> list[Entry]:
        """Everything that waits, oldest first.

        Raises:
            ValueError: the file is damaged.
        """
        return read_spool(self.path)[1] if self.path.exists() else []

    def drop(self, doomed: Callable[[Entry], bool]) -> None:
        """Takes out the entries that are `doomed`.

        Raises:
            ValueError: the file is damaged.
            OSError: it could not be written; it is as it was.
        """
        entries = self.entries()
        rest = [entry for entry in entries if not doomed(entry)]
        if not rest:
            self.clear()
        elif len(rest) < len(entries):
            write_durably(self.path, b"".join([self._first_line(), *(_line(entry.as_json()) for entry in rest)]))
            self._end = None

    def _first_line(self) -> bytes:
        return _line({"kind": "run", **self.owner._asdict()})

    def clear(self) -> None:
        """Removes the file: everything has been delivered."""
        self.path.unlink(missing_ok=True)
        self._end = None


def read_spool(path: Path) -> tuple[Owner, list[Entry]]:
    """A spool's run and its entries; half a line at the end, of a process that died, is left out.

    Raises:
        ValueError: a line cannot be read; it names file and line.
    """
    entries: list[Entry] = []
    owner: Owner | None = None
    for number, line in enumerate(path.read_bytes()[: _whole_lines(path)].splitlines(), start=1):
        try:
            value = json.loads(line)
            if number == 1:
                owner = Owner(str(value["tracking_uri"]), str(value["run_id"]))
            else:
                entries.append(entry_of(value))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} cannot be read ({error}); mend or remove the line") from error
    if owner is None:
        raise ValueError(f"{path}: is empty; remove it")
    return owner, entries


def _line(value: object) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1


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


def merge(entries: Iterable[Entry]) -> Iterator[Entry]:
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


log = logging.getLogger(__name__)

ATTEMPTS = 3
PAUSE_S = 0.5
"""Seconds before the second attempt to write an entry; each further pause is twice as long."""
FIRST_PROBE_S = 5.0
LONGEST_PROBE_S = 300.0
"""Seconds until a store that did not answer is asked again: the first time, and at most."""


class Outbox:
    """Writes a run's entries in order, each exactly once, whatever the tracking store does meanwhile.

    An entry is tried `ATTEMPTS` times. If the store still does not take it, it goes to the spool, and so does all that
    follows, so that training does not wait; the store is asked again now and then, with growing pauses. What not even
    the spool takes (a full disk) is held in memory and written as soon as either can be written again.

    Args:
        client: of the store.
        run_id: the run.
        spool: of the run; what an earlier process left in it is delivered first.
    """

    def __init__(self, client: MlflowClient, run_id: str, spool: Spool) -> None:
        self.client = client
        self.run_id = run_id
        self.spool = spool
        self.unwritten: list[Entry] = []
        """In memory only: neither the store nor the spool has taken them."""
        self.spooled = spool.path.exists()
        """Something waits in the spool."""
        self.trouble = ""
        """Why the store did not take the last entry; empty while all is well."""
        self._probe_at = 0.0
        self._pause_s = FIRST_PROBE_S

    @property
    def waiting(self) -> bool:
        """Whether something has not reached the store yet."""
        return self.spooled or bool(self.unwritten)

    def send(self, entry: Entry) -> None:
        """Writes an entry, or keeps it for later; never raises for the store's or the disk's sake."""
        if not self.waiting and self._attempt(entry):
            return
        self.unwritten.append(entry)
        self._keep()
        if time.monotonic() >= self._probe_at:
            self.flush()

    def entries(self) -> list[Entry]:
        """All that waits, oldest first.

        Raises:
            ValueError: the spool is damaged.
        """
        return [*(self.spool.entries() if self.spooled else ()), *self.unwritten]

    def flush(self) -> bool:
        """Delivers all that waits, if the store answers; whether nothing waits any more."""
        if not self.waiting:
            return True
        try:
            for entry in merge(self.entries()):
                entry.deliver(self.client, self.run_id)
        except store_errors() as error:
            self._postpone(error)
            return False
        except ValueError as error:
            # A damaged spool: the file stays for a human to look at, and what follows goes behind it.
            self._postpone(error)
            return False
        return self._delivered()

    def _attempt(self, entry: Entry) -> bool:
        """Whether the store took the entry, tried a few times."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                entry.deliver(self.client, self.run_id)
                return True
            except store_errors() as error:
                trouble: Exception = error
        log.warning(
            "%s does not take what is logged (%s): it is kept in %s and written when the store answers again",
            mask(self.spool.owner.tracking_uri),
            reason_of(trouble),
            self.spool.path,
        )
        self._pause_s = FIRST_PROBE_S / 2
        self._postpone(trouble)
        return False

    def _postpone(self, error: Exception) -> None:
        self.trouble = reason_of(error)
        self._pause_s = min(2 * self._pause_s, LONGEST_PROBE_S)
        self._probe_at = time.monotonic() + self._pause_s

    def _keep(self) -> None:
        """Moves what is in memory to the spool."""
        while self.unwritten:
            try:
                self.spool.append(self.unwritten[0])
            except OSError as error:
                if len(self.unwritten) == 1:
                    log.warning("%s cannot be written (%s): tried again later", self.spool.path, reason_of(error))
                return
            self.spooled = True
            del self.unwritten[0]

    def _delivered(self) -> bool:
        self.unwritten.clear()
        try:
            self.spool.clear()
        except OSError as error:
            # It will be delivered once more, which changes nothing.
            self._postpone(error)
            return False
        log.warning("%s answers again: nothing was lost", mask(self.spool.owner.tracking_uri))
        self.spooled, self.trouble = False, ""
        return True
