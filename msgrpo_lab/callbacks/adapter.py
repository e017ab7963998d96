"""Keeps what was trained: the policy at its best evaluation, and the last one, as safetensors."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import MLFlowLogger

from msgrpo_lab.callbacks.held_out import HeldOutEvaluation
from msgrpo_lab.module import LAPModule

log = logging.getLogger(__name__)


class AdapterKeeper(L.Callback):
    """Writes `adapter/best` and `adapter/last` (the LoRA adapter, or all weights where all are trained).

    They go into the run's folder, and to MLflow as artifacts, when training ends or is interrupted. "Best" is by the
    sampled held-out return; it is in memory until the end, so that a good policy survives a late collapse.

    Args:
        folder: folder of the run.
        evaluation: the held-out evaluation; it must stand before this callback in the trainer's list.
    """

    def __init__(self, *, folder: Path, evaluation: HeldOutEvaluation) -> None:
        self.folder = folder
        self.evaluation = evaluation
        self.best_score = -math.inf
        self.best_update = 0
        self._best: dict[str, torch.Tensor] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes a copy if the latest evaluation is the best so far."""
        score = self.evaluation.latest_return
        if self.evaluation.evaluated_at == trainer.global_step and score > self.best_score:
            self.best_score, self.best_update = score, trainer.global_step
            self._best = {
                name: parameter.detach().to("cpu", copy=True)
                for name, parameter in pl_module.named_parameters()
                if parameter.requires_grad
            }

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes both, and hands them to MLflow."""
        self._keep(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same where a run that has made an update is interrupted or told to end: hours may be in it."""
        # Lightning turns SIGTERM into a SystemExit of its own.
        if isinstance(exception, KeyboardInterrupt | SystemExit) and trainer.global_step > 0:
            self._keep(trainer, pl_module)

    def _keep(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LAPModule)
        target = self.folder / "adapter"
        shutil.rmtree(target, ignore_errors=True)
        pl_module.policy.save(target / "last")
        if self._best:
            last = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}
            _load(pl_module, self._best)
            pl_module.policy.save(target / "best")
            _load(pl_module, last)
            log.info("best held-out return %.3f at update %d, kept in %s", self.best_score, self.best_update, target)
        for logger in trainer.loggers:
            if isinstance(logger, MLFlowLogger) and logger.run_id is not None:
                logger.experiment.log_artifacts(logger.run_id, str(target), "adapter")


@torch.no_grad()
def _load(module: L.LightningModule, values: dict[str, torch.Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name in values:
            parameter.copy_(values[name])
