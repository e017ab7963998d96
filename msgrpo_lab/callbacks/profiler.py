"""A trace of rollouts and updates that opens in a public viewer: what ran when, down to single operators."""

# ruff: noqa: ARG002  (Lightning fixes the signatures)
from __future__ import annotations

import contextlib
import functools
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from msgrpo_lab.training.data import RolloutDataModule
from msgrpo_lab.types import RolloutBatch

log = logging.getLogger(__name__)

TRACE = "trace.json"


class TraceProfiler(L.Callback):
    """Writes `trace.json` (Chrome's trace format) into the run's folder.

    In it, everything that happens within a rollout lies under the label `rollout`, and within an optimiser step, with
    its forward and backward passes, under `update`. Recording slows a run down: leave it out where speed is measured.

    Args:
        skip: rollouts before the first one that is recorded, to leave the warm-up out.
        rollouts: rollouts that are recorded, each with its updates.
        record_shapes: note the shapes of operators' arguments too; the file grows by half.

    Raises:
        ValueError: `skip` is below 0, or `rollouts` below 1.
    """

    def __init__(self, *, skip: int = 1, rollouts: int = 2, record_shapes: bool = False) -> None:
        if skip < 0:
            raise ValueError(f"callbacks.profiler.skip={skip}: must be at least 0; give for example 1")
        if rollouts < 1:
            raise ValueError(f"callbacks.profiler.rollouts={rollouts}: must be at least 1; give for example 2")
        self.skip, self.rollouts, self.record_shapes = skip, rollouts, record_shapes
        self._collected = 0
        self._profiler: profile | None = None
        self._label = contextlib.ExitStack()
        self.path: Path | None = None
        """Where the trace was written."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Labels the data module's rollouts. Recording begins with one, because Lightning fetches batches ahead."""
        data = _data(trainer)
        collect = data.collect

        @functools.wraps(collect)
        def labelled(*args: Any, **kwargs: Any) -> RolloutBatch:
            if self._collected == self.skip:
                self._start()
            self._collected += 1
            with record_function("rollout"):
                return collect(*args, **kwargs)

        vars(data)["collect"] = labelled

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Opens the label `update`."""
        self._label.enter_context(record_function("update"))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Closes the label, and ends the recording after the last update of the last rollout."""
        self._label.close()
        last_update = batch_idx + 1 == _data(trainer).updates_per_epoch
        if last_update and self._collected == self.skip + self.rollouts:
            self._finish(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """What was recorded so far may show why."""
        self._label.close()
        self._finish(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the labels away, and writes what a shorter run has recorded."""
        vars(_data(trainer)).pop("collect", None)
        self._finish(trainer)
        if self.path is None:
            log.warning(
                "callbacks.profiler.skip=%d: the run made %d rollouts, so nothing was recorded; set "
                "trainer.max_epochs above it",
                self.skip,
                self._collected,
            )

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, record_shapes=self.record_shapes, acc_events=True)
        self._profiler.start()

    def _finish(self, trainer: L.Trainer) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        self.path = Path(trainer.default_root_dir) / TRACE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.path))
        self._profiler = None
        log.info("trace of rollouts and updates: %s", self.path)
        log.info("open it at https://ui.perfetto.dev (it stays in the browser) or in Chrome at chrome://tracing")


def _data(trainer: L.Trainer) -> RolloutDataModule:
    data: Any = getattr(trainer, "datamodule", None)
    if not isinstance(data, RolloutDataModule):
        raise RuntimeError("callbacks.profiler: the trainer has no RolloutDataModule to record the rollouts of")
    return data
