"""The main job: `python -m msgrpo_lab.train`. Compose, check, assemble, fit; `resume=auto` goes on where it was left.

python -m msgrpo_lab.train -m sampler=uniform,abs_adv env=snake,frozenlake
"""

from __future__ import annotations

import logging
import math
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig

from msgrpo_lab.config import check_command_line, conf_dir
from msgrpo_lab.config.command_line import runs_jobs
from msgrpo_lab.messages import one_line
from msgrpo_lab.runs.folder import CheckpointError, RunFolderError, RunRecord, RunStatus, lock_folder, note_failure
from msgrpo_lab.runs.jobs import DRY_RUN, print_dry_run, with_folder
from msgrpo_lab.runs.last_folder import remember_run
from msgrpo_lab.runs.stopping import Stopped, Stopping

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from msgrpo_lab.runs.resume import Beginning
    from msgrpo_lab.tracking.tracking import Tracking

log = logging.getLogger(__name__)


class CannotStart(SystemExit):
    """A job ends before its first rollout, with exit code 1; `reason` is one line, which has been printed."""

    def __init__(self, reason: str) -> None:
        super().__init__(1)
        self.reason = one_line(reason)
        print(f"msgrpo_lab: {self.reason}", file=sys.stderr)


def train(config: DictConfig) -> float:
    """One training run from a checked configuration, in the folder that Hydra gives it.

    Returns:
        The last evaluation's sampled return on the held-out seeds (what Hydra's optimising sweepers maximise).

    Raises:
        CannotStart: the model, the store, the folder or the checkpoint cannot be used.
        Stopped: a signal ended it.
    """
    from msgrpo_lab.config.components import resolve
    from msgrpo_lab.runs.resume import beginning

    folder = Path(HydraConfig.get().runtime.output_dir)
    plain = resolve(config)
    try:
        with lock_folder(folder):
            begin = beginning(folder, plain, resume=config.resume, ckpt_path=config.ckpt_path)
            if begin.finished is not None:
                log.info("%s: finished already; leave resume=auto out to train anew", folder)
                return math.nan if begin.finished.result is None else begin.finished.result
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                remember_run(config, folder)
            return _train(config, folder, begin, plain)
    except (CheckpointError, RunFolderError) as error:
        raise CannotStart(str(error)) from error


def _train(config: DictConfig, folder: Path, begin: Beginning, plain: dict[str, Any]) -> float:
    # Heavy imports wait until the command line has been found right.
    import torch

    from msgrpo_lab.callbacks.fit import fit, going_on_from
    from msgrpo_lab.training.assemble import build_lab, component
    from msgrpo_lab.training.heap import keep_freed_memory

    _quieten()
    keep_freed_memory()
    torch.use_deterministic_algorithms(True)
    # It would also fill every new tensor with NaN before its first use, which nothing here relies on.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    tracking = component(config.logger)
    status: RunStatus = "FAILED"
    result: float | None = None
    record: RunRecord | None = None
    try:
        # Signals are heard before the run is opened, so that an open run is always marked.
        with Stopping() as stopping:
            logger = _opened(tracking, config, folder, begin)
            record = RunRecord(status="RUNNING", run_id=getattr(logger, "run_id", None), config=plain)
            record.write(folder)
            try:
                lab = build_lab(going_on_from(begin.snapshot, config))
            except (ValueError, OSError, InstantiationException) as error:
                # What only the model itself can tell: a damaged file, LoRA targets it does not have.
                raise CannotStart(str(innermost(error))) from error
            result = fit(config, lab, logger=logger, folder=folder, begin=begin, plain=plain, stopping=stopping)
        status = "FINISHED"
    except Stopped as stop:
        status = "KILLED"
        remedy = "the same command with resume=auto goes on from there"
        log.warning("signal %d: the run is marked KILLED, its checkpoints are in %s; %s", stop.signum, folder, remedy)
        raise
    finally:
        tracking.finish(status)
        if record is not None:
            replace(record, status=status, result=result).write(folder)
    return result


def _opened(tracking: Tracking, config: DictConfig, folder: Path, begin: Beginning) -> Logger:
    """Opens the tracked run.

    Raises:
        CannotStart: the store cannot be used.
    """
    from msgrpo_lab.tracking.database import refusal_of

    try:
        # A process that was killed while it opened its run had no time to write the run's id down.
        earlier = begin.run_id or (tracking.opened_in(folder) if config.resume is not None else None)
        return tracking.start(config, run_id=earlier)
    except Exception as error:
        reason = refusal_of(error)
        if reason is None:
            raise
        raise CannotStart(reason) from error


def innermost(error: BaseException) -> BaseException:
    """The error that Hydra's instantiation errors were raised from."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _quieten() -> None:
    """Leaves out what the libraries say that no user of the lab can act on."""
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.accelerators.cuda",
        "lightning.pytorch.trainer.connectors.signal_connector",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*does not have many workers.*",
        r".*module\(s\) in eval mode.*",
        r".*is_gradient_checkpointing.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _swept(config: DictConfig) -> float:
    """A job of a sweep: what goes wrong in it is noted in its folder, and the next job has its turn.

    Returns:
        What `train` returns; nan where it failed.
    """
    if Stopped.job_of_sweep is not None:
        raise Stopped(Stopped.job_of_sweep)
    folder = Path(HydraConfig.get().runtime.output_dir)
    note_failure(folder, None)
    try:
        return train(config)
    except Stopped as stop:
        Stopped.job_of_sweep = stop.signum
        raise
    except KeyboardInterrupt:
        raise
    except SystemExit as end:
        reason = str(getattr(end, "reason", f"it ended with exit code {end.code}"))
    except Exception as error:
        log.exception("this job failed; the sweep goes on")
        reason = one_line(f"{type(error).__name__}: {error}")
    note_failure(folder, reason)
    return math.nan


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")
def _job(config: DictConfig) -> float:
    return _swept(config) if HydraConfig.get().mode == RunMode.MULTIRUN else train(config)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: mistakes on the command line are told in one line each, with exit code 2, before anything runs.

    Raises:
        Stopped: Ctrl-C before a run was opened, or between two jobs of a sweep; exit code 130, as in a run.
    """
    try:
        return _main(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("msgrpo_lab: interrupted", file=sys.stderr)
        raise Stopped(signal.SIGINT) from None


def _main(given: list[str]) -> Any:
    argv = [argument for argument in given if argument != DRY_RUN]
    check_command_line(argv, "train")
    if runs_jobs(argv):
        argv = with_folder(argv, "train")
        if DRY_RUN in given:
            return print_dry_run(argv, "train")
    sys.argv = [sys.argv[0], *argv]
    return _job()


if __name__ == "__main__":
    main()
