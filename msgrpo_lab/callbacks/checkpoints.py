"""Checkpoints and adapters while a run trains: put back at its start, written between epochs, taken up again."""

# ruff: noqa: ARG002  (Lightning fixes the signatures)

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from safetensors import SafetensorError

from msgrpo_lab.callbacks.evaluation import HeldOutEvaluation
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.runs.checkpoint import (
    FOLDER,
    Snapshot,
    checkpoints,
    clear_leftovers,
    newest,
    prune,
    write_checkpoint,
)
from msgrpo_lab.runs.folder import CheckpointError, RunFolderError
from msgrpo_lab.tracking.database import reason_of
from msgrpo_lab.tracking.logger import RunLogger
from msgrpo_lab.training.module import LAPModule
from msgrpo_lab.training.state import capture, detach, load_trainable, restore, restore_optimizer, trainable


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


log = logging.getLogger(__name__)


class Resumption(L.Callback):
    """Puts a run back where a checkpoint was taken. It must stand first, so that the others see it resumed.

    Args:
        snapshot: the checkpoint.
        adapter: what remembers the best policy; its parameters are put back too.
    """

    def __init__(self, *, snapshot: Snapshot, adapter: AdapterKeeper) -> None:
        self.snapshot = snapshot
        self.adapter = adapter

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first rollout, which Lightning collects before `on_train_start`."""
        assert isinstance(pl_module, LAPModule)
        restore(self.snapshot, trainer, pl_module)
        self.adapter.best = best_of(self.snapshot)


def best_of(snapshot: Snapshot) -> dict[str, Any]:
    """The parameters at the best evaluation so far; empty before the first."""
    if snapshot.best is not None:
        return snapshot.best
    had_one = any("best_update" in state for state in snapshot.state["callbacks"].values())
    return {name: value.clone() for name, value in snapshot.weights.items()} if had_one else {}


class CheckpointKeeper(L.Callback):
    """Writes checkpoints of a run. It must stand last, so that they hold what the other callbacks did in the epoch.

    There is one of update 0, one every `every` epochs, one of the last epoch, and one of the last whole epoch of a run
    that is interrupted. A checkpoint that cannot be written (a full disk) is warned of and tried again an epoch later.

    Args:
        folder: folder of the run.
        origin: what the run is, for `state.json`.
        adapter: what remembers the best policy.
        every: epochs between two checkpoints.
        keep_last: newest checkpoints that are kept, beside the one of the best evaluation.
    """

    def __init__(
        self, *, folder: Path, origin: Mapping[str, Any], adapter: AdapterKeeper, every: int = 1, keep_last: int = 2
    ) -> None:
        self.parent = folder / FOLDER
        self.origin = origin
        self.adapter = adapter
        self.every = every
        self.keep_last = keep_last
        self.pending: Snapshot | None = None
        """The last whole epoch, while it is not on the disk."""
        self.needed: int | None = None
        """The newest checkpoint up to this update is kept too, to be rolled back to."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Update 0: what a policy that breaks down at once is rolled back to."""
        clear_leftovers(self.parent)
        if trainer.current_epoch == 0:
            self._write(self._capture(trainer, pl_module, epoch=0))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The epoch is complete: a checkpoint, or a copy in memory until one is due."""
        epoch = trainer.current_epoch + 1
        snapshot = self._capture(trainer, pl_module, epoch=epoch)
        if self._due(epoch) or epoch == trainer.max_epochs:
            self._write(snapshot)
        else:
            self.pending = detach(snapshot)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The epoch in flight is dropped; the last whole one is kept."""
        if self.pending is not None:
            self._write(self.pending)

    def roll_back(self, trainer: L.Trainer, module: LAPModule, lr_factor: float, until: int | None = None) -> int:
        """Gives a run the parameters and the optimiser of an earlier checkpoint, and goes on with a lower rate.

        It goes on, not back: counters, epochs and the schedule's place stay as they are, so no metric is logged twice
        and the next rollout is another one. All later learning rates are `lr_factor` times what they would have been;
        this is part of the schedule's state, and so of later checkpoints. A run that is resumed rolls back exactly as
        one that was never killed: only checkpoints that are due by `every` count.

        Args:
            trainer: in the middle of `fit`.
            module: what is trained.
            lr_factor: in (0, 1].
            until: the newest checkpoint up to this update is taken; None takes the newest of all.

        Returns:
            The update whose parameters the run has now.

        Raises:
            CheckpointError: there is no sound checkpoint.
        """

        def wanted(snapshot: Snapshot) -> bool:
            return self._due(snapshot.epoch) and (until is None or snapshot.update <= until)

        found = newest(self.parent, wanted)
        if found is None:
            raise CheckpointError(f"{self.parent}: there is no checkpoint to roll back to; set checkpoint.every lower")
        snapshot = found[1]
        load_trainable(module.policy, snapshot.weights)
        group_rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        restore_optimizer(snapshot, trainer)
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        scheduler.base_lrs = [rate * lr_factor for rate in scheduler.base_lrs]
        for group, rate in zip(trainer.optimizers[0].param_groups, group_rates, strict=True):
            group["lr"] = rate * lr_factor
        scheduler._last_lr = [group["lr"] for group in trainer.optimizers[0].param_groups]
        return snapshot.update

    def _needed(self, snapshot: Snapshot) -> set[int]:
        """The checkpoint that a roll-back would take, once `snapshot` has been written."""
        if self.needed is None or snapshot.epoch == 0:
            return set()
        between = self.every * (snapshot.update // snapshot.epoch)
        due = [update for update, _ in checkpoints(self.parent) if update % between == 0 and update <= self.needed]
        return set(due[-1:])

    def _due(self, epoch: int) -> bool:
        return epoch % self.every == 0

    def _capture(self, trainer: L.Trainer, module: L.LightningModule, epoch: int) -> Snapshot:
        assert isinstance(module, LAPModule)
        best_is_now = self.adapter.best_update == trainer.global_step
        best = None if best_is_now or not self.adapter.best else self.adapter.best
        return capture(trainer, module, epoch=epoch, origin=self.origin, best=best)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_checkpoint(self.parent, snapshot)
            self.pending = None
            keep = {self.adapter.best_update} if self.adapter.best else set()
            prune(self.parent, keep=keep | self._needed(snapshot), last=self.keep_last)
        except OSError as error:
            self.pending = detach(snapshot)
            reason = error.strerror or str(error)
            log.warning(
                "%s: no checkpoint of update %d could be written (%s); training goes on, and the next one is tried",
                self.parent,
                snapshot.update,
                reason,
            )
