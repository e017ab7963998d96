"""Policies of training runs in MLflow, `run:<id>` and `sweep:<id>`: their weights, and how they read and answer."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from msgrpo_lab.callbacks.store import check_reachable, database_path, mlflow_module
from msgrpo_lab.evaluation.contender import Origin
from msgrpo_lab.evaluation.training import check_training_config
from msgrpo_lab.messages import mask

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Which = Literal["last", "best"]
CONFIG = "config/resolved.yaml"
PARENT = "tags.`mlflow.parentRunId`"
LATEST = "latest"


class RunSource:
    """The tracking store that training runs are looked up in; opened when the first is asked for, and never made.

    Args:
        tracking_uri: its address.
        experiment: where the newest sweep is looked for.
    """

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self._opened: MlflowClient | None = None

    @property
    def _client(self) -> MlflowClient:
        if self._opened is None:
            check_reachable(self.tracking_uri)
            path = database_path(self.tracking_uri)
            if path is not None and not _has_runs(path):
                raise ValueError(f"there is no tracking database at {path}; give source.tracking_uri=sqlite:///…")
            self._opened = mlflow_module().MlflowClient(self.tracking_uri)
        return self._opened

    def run(self, run_id: str) -> Run:
        """The run of this id.

        Raises:
            ValueError: there is none, or the store cannot be read; one line without the key.
        """
        client = self._client
        try:
            return client.get_run(run_id)
        except mlflow_module().exceptions.MlflowException as error:
            raise ValueError(f"no such run in {mask(self.tracking_uri)}; give source.tracking_uri=…") from error

    def sweep(self, name: str) -> tuple[list[Run], int]:
        """The finished runs of a sweep, by parent id or `latest` (the newest finished one), oldest first, and how many
        others it has.

        Raises:
            ValueError: there is no such sweep, or no run of it has finished; one line without the key.
        """
        client = self._client
        parent = self._newest_sweep() if name == LATEST else self.run(name)
        found = _search(client, parent.info.experiment_id, f"{PARENT} = '{parent.info.run_id}'")
        jobs = [run for run in found if run.data.tags.get("msgrpo.kind") == "job"]
        finished = [run for run in jobs if run.info.status == "FINISHED"]
        if not finished:
            raise ValueError(f"{parent.info.run_id} has no finished training run; give the id of a sweep's parent run")
        return finished, len(jobs) - len(finished)

    def _newest_sweep(self) -> Run:
        experiment = self._client.get_experiment_by_name(self.experiment)
        found = (
            []
            if experiment is None
            else _search(self._client, experiment.experiment_id, "tags.`msgrpo.kind` = 'sweep'")
        )
        finished = [run for run in found if run.info.status == "FINISHED"]
        if not finished:
            problem = f"experiment {self.experiment} has no finished sweep in {mask(self.tracking_uri)}"
            raise ValueError(f"{problem}; give sweep:<id of its parent run>, or source.experiment=…")
        return finished[-1]

    def adapter(self, run: Run, which: Which) -> Path:
        """The folder of a run's trained weights.

        Raises:
            ValueError: the run has kept none; one line without the key.
        """
        return self._artifact(run, f"adapter/{which}", "it ended before its policy was kept")

    def config(self, run: Run) -> dict[str, Any]:
        """The configuration that a run was trained under, as plain values.

        Raises:
            ValueError: there is none, it is damaged, or it names code outside of this package; one line.
        """
        path = self._artifact(run, CONFIG, "it is no training run of this lab")
        try:
            tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except (OmegaConfBaseException, YAMLError, OSError) as error:
            raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); train the run again") from error
        return check_training_config(tree, str(path))

    def _artifact(self, run: Run, path: str, why: str) -> Path:
        try:
            found = Path(self._client.download_artifacts(run.info.run_id, path))
        except (mlflow_module().exceptions.MlflowException, OSError) as error:
            raise ValueError(f"run {run.info.run_id} ({run.info.status}) has no artifact {path}: {why}") from error
        if not found.exists():
            raise ValueError(f"run {run.info.run_id} ({run.info.status}) has no artifact {path}: {why}")
        return found


def origin_of(run: Run) -> Origin:
    """What a run's tags say of it."""
    tags: Mapping[str, str] = run.data.tags
    return Origin(
        trained_on=tags.get("env", ""),
        model=tags.get("model", ""),
        sampler=tags.get("sampler", ""),
        credit=tags.get("credit", ""),
        seed=tags.get("seed", ""),
        source_run=str(run.info.run_id),
    )


def _search(client: MlflowClient, experiment_id: str, filter_string: str) -> list[Run]:
    """All runs that match, oldest first."""
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment_id], filter_string, max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _has_runs(path: Path) -> bool:
    """Whether an sqlite file is there and holds MLflow's tables; opening it by MLflow would make them."""
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            tables = connection.execute("select count(*) from sqlite_master where type = 'table' and name = 'runs'")
            return bool(tables.fetchone()[0])
    except sqlite3.DatabaseError:
        return False
