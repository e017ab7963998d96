"""The place that runs are tracked in: is the address right, and does the database behind it exist?"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

from msgrpo_lab.messages import mask

log = logging.getLogger(__name__)

KEY = "logger.tracking_uri"
DATABASES = ("postgresql", "mysql", "mssql")
LOCK_TIMEOUT_S = 300.0
"""Seconds to wait for another process to make the database; a first migration takes a few."""
CONNECT_TIMEOUT_S = 5.0
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
HTTP_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
"""MLflow's own defaults hold a run up for minutes at every call that a server does not answer; metrics are kept on disk
meanwhile, so that few retries will do."""
LONGEST_REASON = 200
"""Characters of a store's error that are told."""
WAL_ATTEMPTS = 5
WAL_PAUSE_S = 0.5
"""Tries to set the journal mode, and seconds between them."""


def mlflow_module() -> ModuleType:
    """MLflow, imported when it is first needed (it takes seconds), without its telemetry and chatter.

    What goes wrong in its database is raised as well, and told by this project in one line.
    """
    for name, value in {**QUIET, **HTTP_DEFAULTS}.items():
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    for name in ("mlflow.store.db.utils", "mlflow.system_metrics.system_metrics_monitor", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return mlflow


def store_errors() -> tuple[type[Exception], ...]:
    """What a store raises that does not answer, is locked, full or damaged, or refuses a value."""
    from sqlalchemy.exc import SQLAlchemyError

    return (mlflow_module().exceptions.MlflowException, SQLAlchemyError, sqlite3.Error, OSError)


def refusal_of(error: Exception) -> str | None:
    """Why no run can be opened, in one line; None where the error is not the store's."""
    if isinstance(error, ValueError) or getattr(error, "filename", None) is not None:
        return str(error)  # names the key, or the file, by itself
    if isinstance(error, store_errors()):
        return f"the tracking store cannot open a run ({reason_of(error)}); see that it answers and its disk has room"
    return None


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line of the lowest layer's words, without a password that may stand in an address."""
    database_error = getattr(error.__cause__, "orig", None)
    if isinstance(database_error, Exception):
        return str(database_error)
    text = (error.strerror if isinstance(error, OSError) else None) or str(error).strip() or type(error).__name__
    if system_error := re.search(r"\[Errno \d+\] ([\w ]+)", text):
        return system_error[1]
    return mask(text.splitlines()[0])[:LONGEST_REASON]


def database_path(tracking_uri: str) -> Path | None:
    """The file of an sqlite address, `sqlite:///relative` or `sqlite:////absolute`; None for any other address."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return Path(tracking_uri.removeprefix("sqlite:///").partition("?")[0])


def check_form(tracking_uri: str) -> None:
    """Refuse an address that MLflow could not use, looking at nothing but its text.

    Raises:
        ValueError: it is empty, a folder (MLflow 3 no longer writes file stores), or of an unknown scheme.
    """
    scheme = urlsplit(tracking_uri).scheme.partition("+")[0]
    example = "give sqlite:///folder/mlflow.db or http://host:port"
    if scheme == "sqlite":
        path = database_path(tracking_uri)
        if path is None or path.name in ("", ".."):
            raise ValueError(f"{KEY}={mask(tracking_uri)}: an sqlite address has three slashes and a file; {example}")
    elif scheme in ("http", "https"):
        if not urlsplit(tracking_uri).hostname:
            raise ValueError(f"{KEY}={mask(tracking_uri)}: there is no host in it; {example}")
    elif scheme not in DATABASES:
        kind = "a folder, which MLflow 3 no longer writes to" if scheme in ("", "file") else "of an unknown scheme"
        raise ValueError(f"{KEY}={mask(tracking_uri)}: the address is {kind}; {example}")


def check_reachable(tracking_uri: str) -> None:
    """Refuse an address behind which nothing answers, leaving nothing behind.

    Raises:
        ValueError: the folder cannot be made or written to, the file is no sqlite database, or no server answers.
    """
    check_form(tracking_uri)
    path = database_path(tracking_uri)
    if path is not None:
        _check_database_file(tracking_uri, path)
        return
    parts = urlsplit(tracking_uri)
    if parts.scheme not in ("http", "https"):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((str(parts.hostname), port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "start the server (mlflow server), or give sqlite:///folder/mlflow.db"
        raise ValueError(f"{KEY}={mask(tracking_uri)}: no server answers ({reason}); {remedy}") from error


def _check_database_file(tracking_uri: str, path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{KEY}={tracking_uri}: {path} is a folder; give a file in it, such as {path}/mlflow.db")
    if path.is_file() and path.stat().st_size > 0:
        # Asked through sqlite: to open and close the file by ourselves would drop the locks that this process holds on
        # it (sqlite.org/howtocorrupt.html, 2.2), and the next reader elsewhere would take the log from under a run.
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_S)) as connection:
                connection.execute("PRAGMA schema_version")
        except sqlite3.DatabaseError as error:
            if not isinstance(error, sqlite3.OperationalError):
                reason = f"{path} is not an sqlite database; give another file"
                raise ValueError(f"{KEY}={tracking_uri}: {reason}") from error
    existing = next(folder for folder in (path.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"{KEY}={tracking_uri}: nothing can be written in {existing}; give a file in a folder of yours"
        )


def prepare_store(tracking_uri: str, experiment: str) -> str:
    """Make the tracking store ready for any number of jobs at once.

    MLflow migrates a database when it is first opened, and a fresh sqlite file opened by several processes at once dies
    in that migration: it is therefore done once, under a lock, and the file is set to write-ahead logging so that
    readers do not wait for writers.

    Returns:
        The experiment's id. Its artifacts lie in `artifacts/` beside an sqlite file, not in the working directory.

    Raises:
        ValueError: the address is wrong, nothing answers there, or the experiment is deleted; one line.
    """
    check_reachable(tracking_uri)
    path = database_path(tracking_uri)
    if path is None:
        return _experiment_id(tracking_uri, experiment, None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason, remedy = error.strerror or str(error), "give a file in a folder of yours"
        raise ValueError(f"{KEY}={tracking_uri}: {path.parent} cannot be made ({reason}); {remedy}") from error
    with _locked(path.with_name(f"{path.name}.lock")):
        _use_write_ahead_log(path)
        return _experiment_id(tracking_uri, experiment, (path.absolute().parent / "artifacts").as_uri())


def _experiment_id(tracking_uri: str, experiment: str, artifacts: str | None) -> str:
    mlflow = mlflow_module()
    try:
        client = mlflow.MlflowClient(tracking_uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return str(client.create_experiment(experiment, artifact_location=artifacts))
    except mlflow.exceptions.MlflowException as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{KEY}={mask(tracking_uri)}: MLflow cannot use it ({reason}); give another address"
        ) from error
    if found.lifecycle_stage != "active":
        remedy = f"give another name, or restore it with mlflow experiments restore -x {found.experiment_id}"
        raise ValueError(f"logger.experiment={experiment}: the experiment is deleted; {remedy}")
    return str(found.experiment_id)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes, an exclusive transaction on an empty database; it ends with the process."""
    connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        yield
    finally:
        connection.close()


def _use_write_ahead_log(path: Path) -> None:
    """Sets the journal mode, which stays with the file. Readers then do not wait; nothing else depends on it.

    The switch needs the file for itself for a moment, and sqlite answers a moment's trouble with `OperationalError`.
    """
    for attempt in range(WAL_ATTEMPTS):
        if attempt:
            time.sleep(WAL_PAUSE_S)
        try:
            mode = _journal_mode(path)
            break
        except sqlite3.OperationalError as error:
            mode = f"unknown ({error})"
    if mode != "wal":
        log.warning("%s stays in journal mode %s: jobs that run at once will wait for each other", path, mode)


def _journal_mode(path: Path) -> str:
    """The file's journal mode, after switching it to write-ahead logging if it was another."""
    connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S)
    try:
        mode = str(connection.execute("PRAGMA journal_mode").fetchone()[0])
        return mode if mode == "wal" else str(connection.execute("PRAGMA journal_mode=WAL").fetchone()[0])
    finally:
        connection.close()
