"""The parent run of a sweep: made once before the first job or taken up again, and closed after the last."""

# ruff: noqa: ARG002  (Hydra fixes the signatures)
from __future__ import annotations

import atexit
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from msgrpo_lab.files import write_durably
from msgrpo_lab.messages import one_line
from msgrpo_lab.runs.folder import FAILURE, LOCK, RunFolderError, is_held, lock_folder
from msgrpo_lab.runs.last_folder import digest_of_job, last_folder, remember
from msgrpo_lab.runs.stopping import PassingOn
from msgrpo_lab.tracking.database import reason_of, refusal_of, store_errors
from msgrpo_lab.tracking.tracking import PARENT_VARIABLE, MLflowTracking, Status, Tracking

log = logging.getLogger(__name__)

RECORD = "sweep.json"
"""In the sweep's folder: its parent run and how it stands."""


class SweepParent(Callback):
    """Hydra callback (`hydra.callbacks.tracking`) that gives the jobs of a sweep one parent run.

    The id travels in the environment, which the processes of a parallel launcher inherit. A single run has no parent.
    Hydra swallows what a callback raises: a store that cannot be used therefore ends the program here, and so does, at
    the end, a job that failed. The parent is also closed at the program's exit.

    Args:
        card: writes the card of a sweep that is closed, given the store's address and the parent run's id.
    """

    def __init__(self, card: Callable[[str, str], None] | None = None) -> None:
        self._card = card
        self._tracking: Tracking | None = None
        self._parent: str | None = None
        self._folder: Path | None = None
        self._failed = False
        self._held = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        """A parallel launcher sends its jobs a copy, which holds no lock."""
        return {**self.__dict__, "_held": ExitStack()}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the store and the parent run, or take up those of the sweep in this folder; tell the jobs its id."""
        arguments = [str(argument) for argument in config.hydra.overrides.task]
        self._folder = Path(config.hydra.sweep.dir).absolute()
        try:
            self._held.enter_context(lock_folder(self._folder))
            self._tell_of_unfinished(config)
            tracking: Tracking = instantiate(config.logger)
            record = read_sweep(self._folder)
            if record is None:
                preset = OmegaConf.select(config, "hydra.sweeper.params") or {}
                command = ["msgrpo_lab.train", "-m", *arguments]
                self._parent = tracking.start_sweep(command, swept_keys(arguments, preset))
            else:
                self._parent = record["parent"]
                if self._parent is not None:
                    tracking.continue_sweep(self._parent)
        except Exception as error:
            within = error.__cause__ if isinstance(error, InstantiationException) else None
            cause = within if isinstance(within, Exception) else error
            self._let_go()
            print(f"msgrpo_lab: {one_line(refusal_of(cause) or f'{type(cause).__name__}: {cause}')}", file=sys.stderr)
            raise SystemExit(2) from error
        self._tracking = tracking
        self._note("RUNNING")
        remember(Path(config.paths.outputs), digest_of_job(config.hydra, sweeping=True), self._folder, arguments)
        atexit.register(self._close, "FAILED")
        self._held.enter_context(PassingOn(joblib_workers, self._job_runs))
        if self._parent is not None:
            os.environ[PARENT_VARIABLE] = self._parent

    def _tell_of_unfinished(self, config: DictConfig) -> None:
        if config.get("resume") is not None:
            return
        earlier = last_folder(Path(config.paths.outputs), digest_of_job(config.hydra, sweeping=True))
        record = None if earlier is None or earlier == self._folder else read_sweep(earlier)
        if record is not None and record["status"] != "FINISHED":
            log.warning("this very sweep is unfinished in %s; add resume=auto to go on with that one", earlier)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Remember a job that could not even be run. Others tell it by a file in their folder."""
        self._failed = self._failed or job_return.status != JobStatus.COMPLETED

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """If a job failed, say which and why, and end with code 1; before that, close the parent run.

        The jobs are named first and the code is 1 whatever the store does.
        """
        assert self._folder is not None
        failures = failures_in(self._folder)
        self._failed = self._failed or bool(failures)
        for name, reason in failures:
            print(f"msgrpo_lab: job {name} failed: {reason}", file=sys.stderr)
        try:
            self._close("FAILED" if self._failed else "FINISHED")
        except Exception:
            log.exception("the sweep could not be closed")
            self._failed = True
        if self._failed:
            raise SystemExit(1)

    def _close(self, status: Status) -> None:
        """Closes the parent run; a store or disk that refuses is told in one line."""
        atexit.unregister(self._close)
        os.environ.pop(PARENT_VARIABLE, None)
        try:
            self._note(status)
            if self._tracking is not None and self._parent is not None:
                self._tracking.finish_sweep(self._parent, status)
                if self._card is not None and isinstance(self._tracking, MLflowTracking):
                    self._card(self._tracking.tracking_uri, self._parent)
        except Exception as error:
            if not isinstance(error, store_errors()):
                raise
            reason, remedy = one_line(reason_of(error)), "the same command with resume=auto closes it"
            print(f"msgrpo_lab: {self._folder}: the sweep could not be closed ({reason}); {remedy}", file=sys.stderr)
        finally:
            self._parent = None
            self._held.close()

    def _job_runs(self) -> bool:
        assert self._folder is not None
        return any(is_held(lock.parent) for lock in self._folder.glob(f"*/{LOCK}"))

    def _let_go(self) -> None:
        """Leaves nothing behind where nothing has begun."""
        self._held.close()
        assert self._folder is not None
        if [path.name for path in self._folder.glob("*")] == [LOCK]:
            (self._folder / LOCK).unlink()
            self._folder.rmdir()

    def _note(self, status: str) -> None:
        assert self._folder is not None
        content = {"parent": self._parent, "status": status}
        write_durably(self._folder / RECORD, (json.dumps(content, indent=1) + "\n").encode())


def joblib_workers() -> list[int]:
    """Process ids of the workers that joblib's launcher has started from this process and that are alive."""
    import psutil

    found = []
    for child in psutil.Process().children():
        try:
            if child.status() != psutil.STATUS_ZOMBIE and any("popen_loky" in word for word in child.cmdline()):
                found.append(child.pid)
        except psutil.Error:  # it has just ended
            continue
    return found


def read_sweep(folder: Path) -> dict[str, Any] | None:
    """`parent` and `status` of the sweep in a folder; None where there is none.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"parent": record["parent"], "status": record["status"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        remedy = "delete it to go on under a new parent run"
        raise RunFolderError(f"{path}: cannot be read ({reason}); {remedy}") from error


def failures_in(folder: Path) -> list[tuple[str, str]]:
    """The jobs of a sweep that failed: name of the job's folder, and why."""
    files = sorted(folder.glob(f"*/{FAILURE}"), key=lambda path: (len(path.parent.name.partition("_")[0]), path))
    return [(path.parent.name, one_line(path.read_text(encoding="utf-8"))) for path in files]


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
