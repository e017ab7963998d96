"""Looks between turns and batches whether a signal has come that was not heard."""

# ruff: noqa: ARG002  (Lightning fixes the signatures)
from __future__ import annotations

from typing import Any

import lightning as L

from msgrpo_lab.checkpoint.state import data_of
from msgrpo_lab.stopping import Stopping


class StopCheck(L.Callback):
    """Ends the run at the next turn, batch or epoch after a signal.

    Args:
        stopping: what heard the signal.
    """

    def __init__(self, stopping: Stopping) -> None:
        self.stopping = stopping

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listens to the rollouts, which take longest."""
        data_of(trainer).observers.append(self)

    def on_turn(self, turn: int, horizon: int, live: int) -> None:
        """Between two turns of a rollout."""
        self.stopping.check()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two optimiser steps."""
        self.stopping.check()
