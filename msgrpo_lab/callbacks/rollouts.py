"""Rollouts of a run as files: what `python -m msgrpo_lab.compare` reads."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning as L
from hydra.core.hydra_config import HydraConfig

from msgrpo_lab.callbacks.run_logger import RunLogger
from msgrpo_lab.callbacks.tracked_run import TAGGED_GROUPS
from msgrpo_lab.callbacks.watcher import RolloutWatcher
from msgrpo_lab.data import RolloutDataModule
from msgrpo_lab.fidelity.rollouts import GameSettings, SavedRollout, save_rollout

log = logging.getLogger(__name__)


class RolloutKeeper(RolloutWatcher):
    """Writes `<folder>/update_<updates done>.parquet`, refills included, and hands it to MLflow as an artifact.

    Args:
        every: epochs (rollouts) between two files; None writes none.
        folder: in the run's folder.
        keep_in_mlflow: whether the files become artifacts as well.

    Raises:
        ValueError: `every` is below 1, or `folder` is empty or outside the run's.
    """

    def __init__(self, *, every: int | None = None, folder: str = "rollouts", keep_in_mlflow: bool = True) -> None:
        super().__init__(key="rollouts", every=every)
        if not folder.strip():
            raise ValueError("callbacks.rollouts.folder=: must not be empty; give a name such as rollouts")
        if Path(folder).is_absolute() or folder.startswith("~") or ".." in Path(folder).parts:
            problem = "must lie in the run's folder, or the jobs of a sweep would overwrite each other's files"
            raise ValueError(f"callbacks.rollouts.folder={folder}: {problem}; give a name such as rollouts")
        self.folder = folder
        self.keep_in_mlflow = keep_in_mlflow

    def without_oracle(self, game: str) -> None:
        """Says once that the files will not do for a comparison."""
        log.warning("callbacks.rollouts.every=%s: %s has no oracle; its rollouts cannot be compared", self.every, game)

    def look(self, trainer: L.Trainer, data: RolloutDataModule) -> None:
        """Writes the rollout."""
        if data.rollout is None:
            return
        path = Path(trainer.default_root_dir) / self.folder / f"update_{trainer.global_step:06d}.parquet"
        choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
        saved = SavedRollout(
            batch=data.rollout,
            scenario=GameSettings.of(data.collector.make_game),
            sampling=data.sampling,
            table=None if data.truth is None else data.truth.table,
            origin={
                **{group: str(choices[group]) for group in TAGGED_GROUPS if choices.get(group) is not None},
                "seed": data.seed,
                "epoch": trainer.current_epoch,
                "update": trainer.global_step,
            },
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_rollout(path, saved)
        except OSError as error:
            log.warning("%s could not be written (%s); training goes on without it", path, error.strerror or error)
            return
        if not self.keep_in_mlflow:
            return
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_artifact(path, "rollouts")
