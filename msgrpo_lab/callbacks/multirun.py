"""The parent run of a sweep: made once before the first job, closed after the last."""

# ruff: noqa: ARG002  (Hydra fixes the signatures)
from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from msgrpo_lab.callbacks.tracking import PARENT_VARIABLE, Status, Tracking
from msgrpo_lab.config.mistakes import one_line


class SweepParent(Callback):
    """Hydra callback (`hydra.callbacks.tracking`) that gives the jobs of a sweep one parent run.

    The id travels in the environment, which the processes of a parallel launcher inherit. A single run has no parent.
    Hydra swallows what a callback raises, and leaves `on_multirun_end` out when a job fails: a store that cannot be
    used therefore ends the program here, and the parent is also closed at the program's exit.
    """

    def __init__(self) -> None:
        self._tracking: Tracking | None = None
        self._parent: str | None = None
        self._failed = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the store and the parent run, and tell the jobs its id."""
        try:
            self._tracking = instantiate(config.logger)
            assert self._tracking is not None
            arguments = [str(argument) for argument in config.hydra.overrides.task]
            preset = OmegaConf.select(config, "hydra.sweeper.params") or {}
            swept = swept_keys(arguments, preset)
            self._parent = self._tracking.start_sweep(["msgrpo_lab.train", "-m", *arguments], swept)
        except (ValueError, OSError, InstantiationException) as error:
            cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
            print(f"msgrpo_lab: {one_line(str(cause))}", file=sys.stderr)
            raise SystemExit(2) from error
        if self._parent is not None:
            os.environ[PARENT_VARIABLE] = self._parent
            atexit.register(self._close, "FAILED")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Remember a failed job. Jobs of a parallel launcher tell it through the store."""
        self._failed = self._failed or job_return.status != JobStatus.COMPLETED

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Close the parent run."""
        self._close("FAILED" if self._failed else "FINISHED")

    def _close(self, status: Status) -> None:
        if self._tracking is None or self._parent is None:
            return
        parent, self._parent = self._parent, None
        os.environ.pop(PARENT_VARIABLE, None)
        atexit.unregister(self._close)
        self._tracking.finish_sweep(parent, status)


def swept_keys(arguments: Sequence[str], preset: Mapping[str, Any] | None = None) -> list[str]:
    """The keys that take several values, in order.

    Args:
        arguments: overrides of the command line.
        preset: `hydra.sweeper.params`, the sweep that a preset brings; a key of the command line takes its place.
    """
    values = [f"{key}={value}" for key, value in (preset or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*values, *arguments])
    last = {override.key_or_group: override for override in overrides}
    return [key for key, override in last.items() if override.is_sweep_override()]
