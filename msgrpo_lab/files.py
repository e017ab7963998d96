"""Files that are written whole or not at all, and folders with a manifest of their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A stream to write a file with: beside its place first, on the disk for good, and then renamed into it.

    Raises:
        OSError: it cannot be written. After any exception, what stood there still does, and nothing is left beside it.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # temporary files are made private
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_durably(path: Path, data: bytes) -> None:
    """Puts a whole file in place of whatever was at `path`, or leaves that alone.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


NAME = "manifest.json"
FORMAT = 1


def write_manifest(folder: Path) -> None:
    """Records the length and SHA-256 of every file in `folder`, and of the record itself.

    Raises:
        OSError: a file cannot be read, or the record not be written.
    """
    files = {path.name: _entry(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != NAME}
    (folder / NAME).write_bytes(_spelt(files))


def check_manifest(folder: Path) -> bool:
    """Holds the files of `folder` against its record.

    Returns:
        Whether there is a record at all.

    Raises:
        ValueError: a file is missing or another one; one line that names it and says why.
    """
    record = folder / NAME
    if not record.is_file():
        return False
    content = record.read_bytes()
    try:
        files = dict(json.loads(content)["files"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(_told(record, "is no manifest")) from error
    if content != _spelt(files):
        raise ValueError(_told(record, "its checksum is not its own"))
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(_told(path, "is missing"))
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(_told(path, f"has {path.stat().st_size} bytes instead of {expected['bytes']}"))
        if _entry(path) != expected:
            raise ValueError(_told(path, "its checksum is not the manifest's"))
    return True


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _spelt(files: dict[str, Any]) -> bytes:
    """The record's one spelling, so that a change of any byte of it can be told."""
    content = {"format": FORMAT, "files": files}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": own}, indent=1, sort_keys=True) + "\n").encode()


def _told(path: Path, problem: str) -> str:
    return f"{path}: {problem}, so that it is damaged or another file; copy the folder again, or have it written again"
