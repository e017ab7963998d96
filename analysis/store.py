"""The tracking store, read only: opened if it is there, and every trouble with it told in one line."""

from __future__ import annotations

import logging
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("analysis.store")

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
            log.warning("sweep %s has no card: make it with python -m msgrpo_lab.callbacks.card %s", sweep, sweep)
            continue
        paths.append(out / (CARD if len(sweeps) == 1 else f"card-{sweep}.md"))
        with tempfile.TemporaryDirectory() as folder, one_line(tracking_uri):
            copied = Path(client.download_artifacts(sweep, CARD, folder))
            paths[-1].write_text(copied.read_text(encoding="utf-8"), encoding="utf-8")
    return paths
