"""Tracking of runs: a component that opens a run, hands Lightning a logger for it, and closes it.

    tracking = hydra.utils.instantiate(cfg.logger)
    logger = tracking.start(cfg)           # before the model is loaded
    ...                                    # Trainer(logger=logger)
    tracking.finish("FINISHED")            # or "FAILED", "KILLED", in every case

Once a run is open, a store that fails costs no metric and no run: see `outbox.Outbox`.

A sweep is one parent run with a child a job; `sweep.SweepParent` makes the parent.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from msgrpo_lab.messages import mask, redact_text
from msgrpo_lab.tracking.csv import CSVTracking
from msgrpo_lab.tracking.database import check_form, check_reachable, database_path, mlflow_module, prepare_store
from msgrpo_lab.tracking.outbox import Outbox, Owner, Spool, known_points, points_of
from msgrpo_lab.tracking.run import (
    FOLDER_TAG,
    LONGEST_PARAM,
    Status,
    continue_run,
    finish_run,
    run_name_of,
    start_run,
    tags_of,
    tells_end,
)

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from msgrpo_lab.tracking.logger import RunLogger

__all__ = ["CSVTracking", "MLflowTracking", "Status", "Tracking", "finish_run", "prepare_store", "start_run"]

PARENT_VARIABLE = "MSGRPO_PARENT_RUN_ID"
"""How a sweep tells its jobs, which may be other processes, the id of their parent run."""


class Tracking(Protocol):
    """What a file of `conf/logger/` names."""

    def start(self, cfg: DictConfig, run_id: str | None = None) -> Logger:
        """Open a run for the resolved configuration `cfg`, and return Lightning's logger for it.

        `run_id` is the run of an earlier process, to be continued.
        """

    def finish(self, status: Status) -> None:
        """Close the run."""

    def opened_in(self, folder: Path) -> str | None:
        """The run that was opened in a folder and not closed, for lack of its process; None where there is none."""

    def folder_of(self, run_id: str) -> Path:
        """The folder of a run; ValueError, with one line, where it cannot be told."""

    def start_sweep(self, command: Sequence[str], swept: Sequence[str]) -> str | None:
        """Make the place and the parent run of a sweep; None where there are no parent runs."""

    def continue_sweep(self, parent_run_id: str) -> None:
        """Open the parent run of a sweep again."""

    def finish_sweep(self, parent_run_id: str, status: Status) -> None:
        """Close the parent run, as failed if a job did not finish."""


@dataclass(kw_only=True)
class MLflowTracking:
    """Runs in MLflow.

    Raises:
        ValueError: `tracking_uri` is no address that MLflow 3 can write to.
    """

    tracking_uri: str
    """`sqlite:///file`, or the address of a server."""
    experiment: str = "msgrpo"
    run_name: str | None = None
    """None: put together from the choices, as in `frozenlake-uniform-episode_return-seed0`."""
    log_system_metrics: bool = True
    """Processor, memory, disk and accelerator load are logged while the run lasts."""
    system_metrics_interval: float = 10.0
    """Seconds between two such measurements."""
    _logger: RunLogger | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuses values that no run could be opened with."""
        check_form(self.tracking_uri)
        if not self.experiment.strip():
            raise ValueError(f"logger.experiment={self.experiment!r}: must not be empty; give a name such as msgrpo")
        if self.system_metrics_interval <= 0:
            interval = self.system_metrics_interval
            raise ValueError(f"logger.system_metrics_interval={interval}: must be greater than 0; give seconds")

    def check(self) -> None:
        """Whether the address answers; nothing is made.

        Raises:
            ValueError: it does not; one line.
        """
        check_reachable(self.tracking_uri)

    def start(self, cfg: DictConfig, run_id: str | None = None) -> Logger:
        """Open a run, a child of the sweep's parent if there is one, and log where it comes from.

        Only the first process of several opens a run. `cfg` may hold interpolations; they are resolved. A run that is
        continued keeps its name, tags and parent, and no metric is written at a step where it has one.

        Raises:
            ValueError: the store cannot be used, or the run cannot be continued.
        """
        from lightning.pytorch.utilities import rank_zero_only

        from msgrpo_lab.tracking.logger import RunLogger

        if getattr(rank_zero_only, "rank", 0) != 0:
            return RunLogger(experiment=self.experiment, tracking_uri=self.tracking_uri, outbox=None)
        mlflow = mlflow_module()
        experiment_id = prepare_store(self.tracking_uri, self.experiment)
        mlflow.set_tracking_uri(self.tracking_uri)
        mlflow.set_experiment(experiment_id=experiment_id)
        if self.log_system_metrics:
            mlflow.set_system_metrics_sampling_interval(self.system_metrics_interval)
        continued = run_id is not None
        if run_id is None:
            tags = tags_of(cfg)
            run_id = start_run(
                cfg,
                parent_run_id=os.environ.get(PARENT_VARIABLE) or None,
                run_name=self.run_name or run_name_of(tags),
                tags=tags,
                log_system_metrics=self.log_system_metrics,
            )
        else:
            # What an earlier process could not say of its end would close the run that goes on.
            self._spool(run_id).drop(tells_end)
            continue_run(cfg, run_id, log_system_metrics=self.log_system_metrics)
        outbox = Outbox(mlflow.MlflowClient(self.tracking_uri), run_id, self._spool(run_id))
        self._logger = RunLogger(
            experiment=self.experiment,
            tracking_uri=self.tracking_uri,
            outbox=outbox,
            known=_known(outbox) if continued else None,
        )
        return self._logger

    def _spool(self, run_id: str) -> Spool:
        return Spool(run_folder(), Owner(mask(self.tracking_uri), run_id))

    def finish(self, status: Status) -> None:
        """Close the run that `start` opened; without one, nothing happens.

        If the store does not answer, one line says where the rest lies and how to upload it.
        """
        logger, self._logger = self._logger, None
        if logger is not None:
            logger.end(status)
        finish_run(status)
        if logger is not None and logger.outbox is not None and logger.outbox.waiting:
            print(f"msgrpo_lab: {_left_behind(logger.outbox)}", file=sys.stderr)

    def opened_in(self, folder: Path) -> str | None:
        """The newest run that was opened in a folder and is still open."""
        experiment_id = prepare_store(self.tracking_uri, self.experiment)
        quoted = str(folder).replace("'", "")  # MLflow's filter has no escape; such a folder is then not found
        found = (
            mlflow_module()
            .MlflowClient(self.tracking_uri)
            .search_runs(
                [experiment_id],
                f"tags.`{FOLDER_TAG}` = '{quoted}' and attributes.status = 'RUNNING'",
                order_by=["attributes.start_time DESC"],
                max_results=1,
            )
        )
        return str(found[0].info.run_id) if found else None

    def folder_of(self, run_id: str) -> Path:
        """The folder of a run.

        Raises:
            ValueError: the store cannot be used, there is no such run, or it has no folder.
        """
        remedy = "give the folder of a checkpoint instead"
        database = database_path(self.tracking_uri)
        if database is not None and not database.exists():  # and none is made by asking
            raise ValueError(f"ckpt_path=run:{run_id}: there is no such run, nor a database {database}; {remedy}")
        mlflow = mlflow_module()
        prepare_store(self.tracking_uri, self.experiment)
        try:
            tags = mlflow.MlflowClient(self.tracking_uri).get_run(run_id).data.tags
        except mlflow.exceptions.MlflowException as error:
            raise ValueError(f"ckpt_path=run:{run_id}: there is no such run; {remedy}") from error
        if FOLDER_TAG not in tags:
            raise ValueError(f"ckpt_path=run:{run_id}: the run does not say where its folder is; {remedy}")
        return Path(tags[FOLDER_TAG])

    def start_sweep(self, command: Sequence[str], swept: Sequence[str]) -> str:
        """Make the database and the parent run of a sweep.

        Returns:
            The parent run's id.

        Raises:
            ValueError: the store cannot be used.
        """
        experiment_id = prepare_store(self.tracking_uri, self.experiment)
        client = mlflow_module().MlflowClient(self.tracking_uri)
        tags = {
            "msgrpo.kind": "sweep",
            "msgrpo.command": redact_text(" ".join(command))[:5000],
            "msgrpo.swept": ",".join(swept),
        }
        name = "sweep " + " × ".join(swept) if swept else "sweep"
        return str(client.create_run(experiment_id, tags=tags, run_name=name[:LONGEST_PARAM]).info.run_id)

    def continue_sweep(self, parent_run_id: str) -> None:
        """Open the parent run of a sweep again.

        Raises:
            ValueError: the store cannot be used, or has no such run.
        """
        prepare_store(self.tracking_uri, self.experiment)
        mlflow = mlflow_module()
        try:
            mlflow.MlflowClient(self.tracking_uri).update_run(parent_run_id, status="RUNNING")
        except mlflow.exceptions.MlflowException as error:
            remedy = "restore it, or start another sweep with resume=null"
            raise ValueError(f"sweep {parent_run_id}: MLflow cannot continue it ({error}); {remedy}") from error

    def finish_sweep(self, parent_run_id: str, status: Status) -> None:
        """Close the parent run: FINISHED only if every child is, KILLED if interrupted children are all that is amiss.

        A child still open has lost its process: KILLED.
        """
        client = mlflow_module().MlflowClient(self.tracking_uri)
        experiment_id = client.get_run(parent_run_id).info.experiment_id
        children = client.search_runs(
            [experiment_id], f"tags.`mlflow.parentRunId` = '{parent_run_id}'", max_results=5000
        )
        for child in children:
            if child.info.status == "RUNNING":
                client.set_terminated(child.info.run_id, "KILLED")
        ends = {child.info.status for child in children} - {"FINISHED"}
        if status == "FINISHED" and ends:
            status = "FAILED"
        elif status == "FAILED" and ends == {"KILLED"}:
            status = "KILLED"  # nothing went wrong: the sweep was interrupted
        client.set_terminated(parent_run_id, status)


def run_folder() -> Path:
    """The folder of the Hydra job that runs, else the working directory."""
    return Path(HydraConfig.get().runtime.output_dir) if HydraConfig.initialized() else Path.cwd()


def _known(outbox: Outbox) -> dict[str, set[int]]:
    """The steps that a continued run has of each metric, in the store or still waiting."""
    outbox.flush()
    known = known_points(outbox.client, outbox.run_id)
    for point in points_of(outbox.entries()):
        known.setdefault(point.key, set()).add(point.step)
    return known


def _left_behind(outbox: Outbox) -> str:
    """What a user is told at the end of a run whose store did not answer."""
    folder = outbox.spool.path.parent
    place = f"{mask(outbox.spool.owner.tracking_uri)} does not answer ({outbox.trouble})"
    if outbox.unwritten:
        return f"{place}, and {len(outbox.unwritten)} entries could not be written to {folder} either: they are lost"
    remedy = f"upload it with python -m msgrpo_lab.upload {folder}"
    return f"{place}: what was logged since lies in {outbox.spool.path}; {remedy}"
