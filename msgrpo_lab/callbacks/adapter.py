"""Keeps what was trained: the policy at its best evaluation, and the last one, as safetensors."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from safetensors import SafetensorError

from msgrpo_lab.callbacks.held_out import HeldOutEvaluation
from msgrpo_lab.callbacks.run_logger import RunLogger
from msgrpo_lab.callbacks.store import reason_of
from msgrpo_lab.checkpoint.state import load_trainable, trainable
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.module import LAPModule
from msgrpo_lab.run_folder import RunFolderError

log = logging.getLogger(__name__)


class AdapterKeeper(L.Callback):
    """Writes `adapter/best` and `adapter/last` (the LoRA adapter, or all weights where all are trained).

    They go into the run's folder, and to MLflow as artifacts, when training ends or is interrupted. "Best" is by the
    sampled held-out return; it is in memory, and in every checkpoint, so that a good policy survives a late collapse.

    Args:
        folder: folder of the run.
        evaluation: the held-out evaluation; it must stand before this callback in the trainer's list.
    """

    def __init__(self, *, folder: Path, evaluation: HeldOutEvaluation) -> None:
        self.folder = folder
        self.evaluation = evaluation
        self.best_score = -math.inf
        self.best_update = 0
        self.best: dict[str, torch.Tensor] = {}
        """Trainable parameters at the best evaluation; empty before the first."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes a copy if the latest evaluation is the best so far."""
        score = self.evaluation.latest_return
        if self.evaluation.evaluated_at == trainer.global_step and score > self.best_score:
            self.best_score, self.best_update = score, trainer.global_step
            self.best = {name: value.to("cpu", copy=True) for name, value in trainable(_policy(pl_module)).items()}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes both, and hands them to MLflow."""
        self.keep(_policy(pl_module), trainer.loggers)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same where a run that has made an update is interrupted or told to end: hours may be in it."""
        if isinstance(exception, KeyboardInterrupt | SystemExit) and trainer.global_step > 0:
            self.keep(_policy(pl_module), trainer.loggers)

    def state_dict(self) -> dict[str, Any]:
        """The best score and its update; the parameters are kept beside it, as tensors."""
        return {"best_score": self.best_score, "best_update": self.best_update} if self.best else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on comparing with the best evaluation of a checkpoint's run."""
        self.best_score, self.best_update = float(state_dict["best_score"]), int(state_dict["best_update"])

    def keep(self, policy: LanguagePolicy, loggers: Iterable[Logger]) -> None:
        """Writes both, and hands them to those of `loggers` that are of MLflow.

        Raises:
            RunFolderError: they cannot be written; what was there before is still there.
        """
        target = self.folder / "adapter"
        try:
            self._write(policy, target)
        except (OSError, SafetensorError) as error:
            reason = f"the adapter could not be written ({reason_of(error)})"
            remedy = "make room; the same command with resume=auto goes on from the last checkpoint and writes it"
            raise RunFolderError(f"{target}: {reason}; {remedy}") from error
        for logger in loggers:
            if isinstance(logger, RunLogger):
                logger.log_artifact(target, "adapter")

    def _write(self, policy: LanguagePolicy, target: Path) -> None:
        """Both or nothing: what was kept before stays until they are complete."""
        temporary = target.with_name(f".{target.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            policy.save(temporary / "last")
            if self.best:
                last = {name: value.clone() for name, value in trainable(policy).items()}
                load_trainable(policy, self.best)
                try:
                    policy.save(temporary / "best")
                finally:
                    load_trainable(policy, last)
                log.info("best held-out return %.3f at update %d, in %s", self.best_score, self.best_update, target)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _policy(module: L.LightningModule) -> LanguagePolicy:
    assert isinstance(module, LAPModule)
    return module.policy
