"""A small run with watchdogs and checkpoints, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lab_made import Memory, fit, small_lab

from msgrpo_lab.callbacks.checkpoints import AdapterKeeper, CheckpointKeeper, Resumption
from msgrpo_lab.callbacks.evaluation import HeldOutEvaluation
from msgrpo_lab.callbacks.watchdogs import Watchdogs
from msgrpo_lab.runs.checkpoint import Snapshot
from msgrpo_lab.training.assemble import Lab

SMALLEST = ("rollout.num_groups=2", "rollout.group_size=2", "sampler.num_episodes=4", "env.horizon=3")


class Run:
    """A run of `epochs` epochs with two updates each; `trouble` stands behind the watchdogs."""

    def __init__(
        self,
        folder: Path,
        *,
        trouble: L.Callback | None = None,
        snapshot: Snapshot | None = None,
        epochs: int = 4,
        keep_last: int = 2,
        **answers: Any,
    ) -> None:
        self.lab: Lab = small_lab(*SMALLEST, "update.minibatches=2", "optim.lr=0.01", f"trainer.max_epochs={epochs}")
        self.epochs, self.folder = epochs, folder
        self.watchdogs = Watchdogs(**answers)
        evaluation = HeldOutEvaluation(episodes=2, every=100, reference_simulations=2, scenario="lake")
        self.adapter = AdapterKeeper(folder=folder, evaluation=evaluation)
        self.keeper = CheckpointKeeper(
            folder=folder, origin={"config": {}}, adapter=self.adapter, every=1, keep_last=keep_last
        )
        resumed = [] if snapshot is None else [Resumption(snapshot=snapshot, adapter=self.adapter)]
        behind = [] if trouble is None else [trouble]
        self.callbacks = [*resumed, *behind, self.watchdogs, evaluation, self.adapter, self.keeper]

    def fit(self) -> Memory:
        return fit(self.lab, epochs=self.epochs, callbacks=self.callbacks, folder=self.folder)

    def memory(self) -> Memory:
        logger = self.lab.module.trainer.loggers[0]
        assert isinstance(logger, Memory)
        return logger
