"""The jobs of a command line before Hydra runs them: the folder to go on in, and what each would do there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write

from msgrpo_lab.config.command_line import CommandLine, command_line
from msgrpo_lab.config.rules import TRACKED
from msgrpo_lab.messages import one_line
from msgrpo_lab.runs.folder import CheckpointError, RunFolderError, is_held
from msgrpo_lab.runs.last_folder import digest, last_folder

DRY_RUN = "--dry-run"
"""Lists what each job would do, and runs none."""


class Job(NamedTuple):
    """One job of a command line."""

    number: int
    overrides: Sequence[str]
    folder: Path
    config: dict[str, Any]
    """Resolved, without Hydra's own node, secrets hidden."""


def with_folder(argv: Sequence[str], config_name: str) -> list[str]:
    """The command line, with the folder of the run or sweep that it goes on with, if it says that it does.

    `resume=auto` finds the folder that the same command trained into last; `ckpt_path=` the run that the checkpoint is
    of. A folder that is given stands.
    """
    with command_line(argv, config_name) as line:
        key = "hydra.sweep.dir" if line.sweeping else "hydra.run.dir"
        given = any(text.startswith(f"{key}=") for text in line.overrides)
        folder = None
        if line.base.resume is not None:
            name = digest(line.overrides, config_name=line.config_name, sweeping=line.sweeping)
            folder = last_folder(Path(line.base.paths.outputs), name)
        elif line.base.ckpt_path is not None and not line.sweeping:
            named = str(line.base.ckpt_path)
            if named.startswith(TRACKED):
                folder = _tracked(line.base, named.removeprefix(TRACKED))
                argv = [*argv, f"ckpt_path={_quoted(folder)}"]
            else:
                folder = _run_of(Path(named).expanduser())
    return list(argv) if folder is None or given else [*argv, f"{key}={_quoted(folder)}"]


def _tracked(config: DictConfig, run_id: str) -> Path:
    """The folder of a tracked run."""
    from hydra.utils import instantiate

    try:
        folder: Path = instantiate(config.logger).folder_of(run_id)
        if not folder.is_dir():
            raise ValueError(
                f"ckpt_path={TRACKED}{run_id}: its folder {folder} is not there; give a checkpoint's folder"
            )
    except ValueError as error:
        print(f"msgrpo_lab: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2) from error
    return folder


def _run_of(path: Path) -> Path | None:
    """The folder of the run that a checkpoint, or the folder itself, is of; None where there is none."""
    from msgrpo_lab.runs.checkpoint import FOLDER
    from msgrpo_lab.runs.folder import RECORD

    resolved = path.resolve()
    for folder in (resolved, resolved.parent.parent):
        if (folder / RECORD).is_file() and (folder == resolved or resolved.parent.name == FOLDER):
            return folder
    return None


def _quoted(folder: Path) -> str:
    """A path as Hydra's grammar wants it."""
    return "'" + str(folder).replace("\\", "\\\\").replace("'", "\\'") + "'"


def jobs_of(argv: Sequence[str], config_name: str) -> list[Job]:
    """Every job that a command line asks for, with its folder."""
    with command_line(argv, config_name) as line:
        return [_job(line, number, overrides) for number, overrides in enumerate(line.jobs())]


def _job(line: CommandLine, number: int, overrides: Sequence[str]) -> Job:
    from msgrpo_lab.config.components import resolve

    config = line.compose(overrides)
    with open_dict(config):
        config.hydra.job.num = config.hydra.job.id = number
    instance = HydraConfig.instance()
    before = instance.cfg
    instance.set_config(config)
    try:
        sweep = config.hydra.sweep
        folder = Path(sweep.dir) / str(sweep.subdir) if line.sweeping else Path(config.hydra.run.dir)
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(folder.absolute())
        plain = resolve(config)
    finally:
        instance.cfg = before
    return Job(number=number, overrides=overrides, folder=folder.absolute(), config=plain)


def print_dry_run(argv: Sequence[str], config_name: str) -> None:
    """Prints a line for each job: its number, what it would do, its folder, and the overrides that not all have.

    Nothing is run or made.
    """
    jobs = jobs_of(argv, config_name)
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    for job in jobs:
        own = " ".join(text for text in job.overrides if text not in shared)
        print(f"{job.number}\t{_would(job)}\t{job.folder}\t{own}")
    sys.stdout.flush()


def _would(job: Job) -> str:
    """What a job would do, in a few words."""
    from msgrpo_lab.runs.resume import beginning

    if is_held(job.folder):
        return "refuse (another process is training there)"
    try:
        config = job.config
        return str(beginning(job.folder, config, resume=config["resume"], ckpt_path=config["ckpt_path"]))
    except (CheckpointError, RunFolderError) as error:
        return f"refuse ({error})"
