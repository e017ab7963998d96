"""Tracking of runs: a component that opens a run, hands Lightning a logger for it, and closes it.

    tracking = hydra.utils.instantiate(cfg.logger)
    logger = tracking.start(cfg)           # before the model is loaded
    ...                                    # Trainer(logger=logger)
    tracking.finish("FINISHED")            # or "FAILED", "KILLED", in every case

A sweep is one parent run with a child a job; `multirun.SweepParent` makes the parent.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from omegaconf import DictConfig, OmegaConf

from msgrpo_lab.callbacks import provenance
from msgrpo_lab.callbacks.store import check_form, check_reachable, mlflow_module, prepare_store
from msgrpo_lab.callbacks.tracked_run import (
    LONGEST_PARAM,
    Status,
    finish_run,
    resolved,
    run_name_of,
    start_run,
    tags_of,
)

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

__all__ = ["CSVTracking", "MLflowTracking", "Status", "Tracking", "finish_run", "prepare_store", "start_run"]

PARENT_VARIABLE = "MSGRPO_PARENT_RUN_ID"
"""How a sweep tells its jobs, which may be other processes, the id of their parent run."""


class Tracking(Protocol):
    """What a file of `conf/logger/` names."""

    def start(self, cfg: DictConfig) -> Logger:
        """Open a run for the resolved configuration `cfg`, and return Lightning's logger for it."""

    def finish(self, status: Status) -> None:
        """Close the run."""

    def start_sweep(self, command: Sequence[str], swept: Sequence[str]) -> str | None:
        """Make the place and the parent run of a sweep; None where there are no parent runs."""

    def finish_sweep(self, parent_run_id: str, status: Status) -> None:
        """Close the parent run, as failed if a job did not finish."""


@dataclass(frozen=True, kw_only=True)
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

    def start(self, cfg: DictConfig) -> Logger:
        """Open a run, a child of the sweep's parent if there is one, and log where it comes from.

        Only the first process of several opens a run. `cfg` may hold interpolations; they are resolved.

        Raises:
            ValueError: the store cannot be used.
        """
        from lightning.pytorch.utilities import rank_zero_only

        if getattr(rank_zero_only, "rank", 0) != 0:
            return _run_logger(self.tracking_uri, self.experiment, None)
        mlflow = mlflow_module()
        experiment_id = prepare_store(self.tracking_uri, self.experiment)
        mlflow.set_tracking_uri(self.tracking_uri)
        mlflow.set_experiment(experiment_id=experiment_id)
        if self.log_system_metrics:
            mlflow.set_system_metrics_sampling_interval(self.system_metrics_interval)
        tags = tags_of(cfg)
        run_id = start_run(
            cfg,
            parent_run_id=os.environ.get(PARENT_VARIABLE) or None,
            run_name=self.run_name or run_name_of(tags),
            tags=tags,
            log_system_metrics=self.log_system_metrics,
        )
        return _run_logger(self.tracking_uri, self.experiment, run_id)

    def finish(self, status: Status) -> None:
        """Close the run that `start` opened; without one, nothing happens."""
        finish_run(status)

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
            "msgrpo.command": provenance.redact_text(" ".join(command))[:5000],
            "msgrpo.swept": ",".join(swept),
        }
        name = "sweep " + " × ".join(swept) if swept else "sweep"
        return str(client.create_run(experiment_id, tags=tags, run_name=name[:LONGEST_PARAM]).info.run_id)

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


@dataclass(frozen=True, kw_only=True)
class CSVTracking:
    """Metrics as a CSV file under `folder`, for debugging: no database, no parent runs."""

    folder: str

    def start(self, cfg: DictConfig) -> Logger:
        """A logger that writes `folder/csv/metrics.csv`; the resolved configuration is written to `folder`."""
        from lightning.pytorch.loggers import CSVLogger

        logger = CSVLogger(save_dir=self.folder, name="", version="csv")
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        text = OmegaConf.to_yaml(OmegaConf.create(resolved(cfg)))
        (Path(self.folder) / "resolved.yaml").write_text(text, encoding="utf-8")
        return logger

    def finish(self, status: Status) -> None:
        """Nothing is open."""

    def start_sweep(self, command: Sequence[str], swept: Sequence[str]) -> None:
        """There are no parent runs."""

    def finish_sweep(self, parent_run_id: str, status: Status) -> None:
        """There are no parent runs."""


def _run_logger(tracking_uri: str, experiment: str, run_id: str | None) -> Logger:
    from lightning.pytorch.loggers import MLFlowLogger

    class RunLogger(MLFlowLogger):
        """Lightning's logger on a run that this project opened, and therefore closes itself."""

        def finalize(self, status: str = "success") -> None:
            """Leave the run open: evaluation and artifacts may follow, and `Tracking.finish` closes it."""

    return RunLogger(experiment_name=experiment, tracking_uri=tracking_uri, run_id=run_id)
