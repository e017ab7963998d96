"""What a run's folder says of the run: a small file, a line if it failed, and a lock that its process holds."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from msgrpo_lab.files import write_durably

RECORD = "run.json"
LOCK = "run.lock"
FAILURE = "failure.txt"
RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line that names the file and why."""


class RunFolderError(ValueError):
    """A run's folder cannot be used; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """How a run stands. `RUNNING` where nobody holds the lock: its process was killed."""

    status: RunStatus
    run_id: str | None = None
    """The tracked run; None where runs are not tracked."""
    result: float | None = None
    """What `train` returned."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration, secrets hidden."""

    def write(self, folder: Path) -> None:
        """Puts it into the run's folder."""
        write_durably(folder / RECORD, (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode())


def read_record(folder: Path) -> RunRecord | None:
    """The record of a run's folder; None where no run has begun there.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = folder / RECORD
    try:
        return RunRecord(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        remedy = "delete it to go on from the newest checkpoint as another tracked run"
        raise RunFolderError(f"{path}: cannot be read ({reason}); {remedy}") from error


def note_failure(folder: Path, reason: str | None) -> None:
    """Leaves the line that a sweep tells at its end, or takes an earlier one away."""
    if reason is None:
        (folder / FAILURE).unlink(missing_ok=True)
    else:
        (folder / FAILURE).write_text(f"{reason}\n", encoding="utf-8")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds a run's folder, so that no second process trains into it. The lock ends with the process, however it ends.

    Raises:
        RunFolderError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "wait for it, or give another hydra.run.dir"
            raise RunFolderError(f"{folder}: another process is training here; {remedy}") from error
        yield


def is_held(folder: Path) -> bool:
    """Whether a process is training into the folder now."""
    if not (folder / LOCK).exists():
        return False
    try:
        with lock_folder(folder):
            return False
    except RunFolderError:
        return True
