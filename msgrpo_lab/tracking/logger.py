"""Lightning's logger on a run that this project opened: nothing is lost when the store fails, nothing written twice."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from msgrpo_lab.tracking.outbox import Artifact, End, Metrics, Outbox, Point, Tag, without_known

_NOT_IN_A_KEY = re.compile(r"[^\w/. -]", re.ASCII)


class RunLogger(MLFlowLogger):
    """Writes metrics, tags and artifacts of one run through an outbox. The run is closed by `Tracking.finish`.

    Args:
        experiment: name of the experiment.
        tracking_uri: address of the store.
        outbox: of the run; None in all but the first of several processes, where nothing is logged.
        known: steps that a continued run has of each metric already; those are not written again.
    """

    def __init__(
        self,
        *,
        experiment: str,
        tracking_uri: str,
        outbox: Outbox | None,
        known: Mapping[str, set[int]] | None = None,
    ) -> None:
        run_id = None if outbox is None else outbox.run_id
        super().__init__(experiment_name=experiment, tracking_uri=tracking_uri, run_id=run_id)
        self.outbox = outbox
        self.known = known or {}
        if outbox is not None:
            # Asks for the run once, while the store is known to answer; later it may not.
            _ = self.experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs values of metrics at an optimiser update."""
        if self.outbox is None:
            return
        now_ms = int(time.time() * 1000)
        points = tuple(
            Point(_NOT_IN_A_KEY.sub("", key), float(value), now_ms, step or 0) for key, value in metrics.items()
        )
        entry = without_known(Metrics(points), self.known)
        if entry.points:
            self.outbox.send(entry)

    @rank_zero_only
    def log_artifact(self, path: Path, to: str) -> None:
        """Copies a file, or what a folder holds, to the folder `to` among the run's artifacts."""
        if self.outbox is not None:
            self.outbox.send(Artifact(str(path.absolute()), to))

    @rank_zero_only
    def set_tag(self, key: str, value: str) -> None:
        """Sets a tag of the run."""
        if self.outbox is not None:
            self.outbox.send(Tag(key, value))

    def end(self, status: str) -> None:
        """Closes the run; if the store does not answer, when what waits is uploaded."""
        if self.outbox is not None:
            self.outbox.send(End(status, int(time.time() * 1000)))
            self.outbox.flush()

    def finalize(self, status: str = "success") -> None:
        """Leaves the run open: evaluation and artifacts may follow, and `Tracking.finish` closes it."""
