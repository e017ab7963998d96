"""Progress: two bars on a terminal, elsewhere a plain line now and then; and the end of a run that is asked to stop."""

# ruff: noqa: ARG002  (Lightning fixes the signatures)

from __future__ import annotations

import logging
import sys
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from msgrpo_lab.runs.stopping import Stopping
from msgrpo_lab.training.state import data_of

log = logging.getLogger(__name__)

SHOWN = (
    ("return", "train/return_mean", "{:.3f}"),
    ("success", "train/success_rate", "{:.3f}"),
    ("env steps/s", "perf/env_steps_per_s", "{:.0f}"),
)
"""What stands beside the bar: label, metric, format."""


class RichTwoBars(L.Callback):
    """Shows how training is getting on.

    It is itself the rollout observer that the data module tells of every turn (`observers`). Set the trainer's own
    `enable_progress_bar` to false beside it.

    Args:
        every_n: updates (epochs: one rollout and its optimiser steps) between two lines where there is no terminal.
        console: where to draw; stderr by default.

    Raises:
        ValueError: `every_n` is below 1.
    """

    def __init__(self, every_n: int = 1, console: Console | None = None) -> None:
        if every_n < 1:
            raise ValueError(f"callbacks.progress.every_n={every_n}: must be at least 1; give for example 1")
        self.every_n = every_n
        self._console = console or Console(file=sys.stderr)
        self._progress: Progress | None = None
        self._updates = TaskID(0)
        self._rollout = TaskID(0)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask the data module to tell of every turn."""
        observers = _observers(trainer)
        if self not in observers:
            observers.append(self)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the bars away, and listen no longer."""
        self._stop()
        observers = _observers(trainer)
        if self in observers:
            observers.remove(self)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the bars, if this is the first process and there is a terminal.

        The first rollout is collected before Lightning's `on_train_start`, when it sets up its data.
        """
        if not trainer.is_global_zero or not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._updates = self._progress.add_task(
            "updates", total=_total(trainer), completed=trainer.current_epoch, note=""
        )
        self._rollout = self._progress.add_task("rollout", total=1, note="")
        self._progress.start()

    def on_turn(self, turn: int, horizon: int, live: int) -> None:
        """`live` episodes are about to play turn `turn` (from 0) of at most `horizon`."""
        if self._progress is not None:
            self._progress.update(self._rollout, completed=turn, total=horizon, note=f"{live} episodes live")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The rollout has ended; what follows is the update."""
        if self._progress is not None:
            total = self._progress.tasks[self._rollout].total
            self._progress.update(self._rollout, completed=total, note="updating")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move the updates' bar on, or write a line."""
        if not trainer.is_global_zero:
            return
        done, note = trainer.current_epoch + 1, summary(trainer.callback_metrics)
        if self._progress is not None:
            self._progress.update(self._updates, completed=done, note=note)
        elif done % self.every_n == 0 or done == _total(trainer):
            log.info("update %d/%s  %s", done, _total(trainer) or "?", note)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the last state of the bars on the terminal."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the terminal back, so that the error can be read."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def summary(metrics: Any) -> str:
    """The shown metrics as text; one that has not been logged yet is left out."""
    shown = [(label, metrics[key], form) for label, key, form in SHOWN if key in metrics]
    return "  ".join(f"{label} {form.format(float(value))}" for label, value, form in shown)


def _observers(trainer: L.Trainer) -> list[Any]:
    """The list of rollout observers of the trainer's data module; an empty one if it has none."""
    observers: list[Any] | None = getattr(getattr(trainer, "datamodule", None), "observers", None)
    return [] if observers is None else observers


def _total(trainer: L.Trainer) -> int | None:
    epochs = trainer.max_epochs
    return epochs if epochs is not None and epochs > 0 else None


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
