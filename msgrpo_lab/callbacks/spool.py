"""A run's spool: what could not be written to the tracking store, as JSON lines in the run's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from msgrpo_lab.callbacks.entries import Entry, entry_of
from msgrpo_lab.files import sync, write_durably

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
