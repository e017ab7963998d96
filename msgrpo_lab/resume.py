"""What a job is to do in its folder: nothing, go on from a checkpoint, or start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgrpo_lab.checkpoint.errors import CheckpointError
from msgrpo_lab.checkpoint.format import Snapshot, read_checkpoint
from msgrpo_lab.checkpoint.identity import check_same_run
from msgrpo_lab.checkpoint.locate import FOLDER, checkpoints, newest
from msgrpo_lab.run_folder import RunFolderError, RunRecord, read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """Where a job begins."""

    snapshot: Snapshot | None = None
    """The checkpoint to go on from; None: at update 0."""
    run_id: str | None = None
    """The tracked run to go on with; None: a new one."""
    finished: RunRecord | None = None
    """The record of a run that is complete: there is nothing to do."""

    def __str__(self) -> str:
        """In a word, for people."""
        if self.finished is not None:
            return "skip (finished)"
        if self.snapshot is not None:
            return f"resume from update {self.snapshot.update}"
        return "run" if self.run_id is None else "run (was killed before its first checkpoint)"


def beginning(folder: Path, config: Mapping[str, Any], *, resume: str | None, ckpt_path: str | None) -> Beginning:
    """What a job with the resolved configuration `config` is to do in `folder`.

    Raises:
        CheckpointError: the checkpoint is damaged, or of a run with another configuration.
        RunFolderError: there is a run in the folder already, and nothing says to go on with it.
    """
    record = read_record(folder)
    if ckpt_path is not None:
        return _named(folder, config, Path(ckpt_path).expanduser(), record)
    if resume is None:
        if record is not None or checkpoints(folder / FOLDER):
            remedy = "add resume=auto to go on with it, or give another folder"
            raise RunFolderError(f"hydra.run.dir={folder}: there is a run in it already; {remedy}")
        return Beginning()
    source = f"resume={resume} in {folder}"
    if record is not None:
        check_same_run(record.config, config, source)
        if record.status == "FINISHED" and _epochs(record.config) == _epochs(config):
            return Beginning(finished=record)
    found = newest(folder / FOLDER)
    if found is not None:
        check_same_run(found[1].state["config"], config, source)
    return Beginning(snapshot=found[1] if found else None, run_id=record.run_id if record else None)


def _named(folder: Path, config: Mapping[str, Any], path: Path, record: RunRecord | None) -> Beginning:
    """Begins at the checkpoint `path`, or at the newest of the run whose folder it is.

    In the run's own folder only the newest will do: behind an older one there lie checkpoints and metrics of another
    history than the one that would be made now.
    """
    if (path / FOLDER).is_dir():
        found = newest(path / FOLDER)
        if found is None:
            raise CheckpointError(f"ckpt_path={path}: there is no checkpoint in it; give the folder of one")
        path, snapshot = found
    else:
        snapshot = read_checkpoint(path)
    check_same_run(snapshot.state["config"], config, f"ckpt_path={path}")
    own = path.resolve().parent == (folder / FOLDER).resolve()
    if record is not None and not own:
        raise RunFolderError(f"hydra.run.dir={folder}: there is another run in it; leave hydra.run.dir out")
    latest = newest(folder / FOLDER) if own else None
    if latest is not None and latest[1].update > snapshot.update:
        reason = f"this run has gone on to update {latest[1].update}"
        remedy = f"give another hydra.run.dir= to begin a tracked run of its own, or ckpt_path={folder} to go on"
        raise RunFolderError(f"ckpt_path={path}: {reason}; {remedy}")
    return Beginning(snapshot=snapshot, run_id=record.run_id if record is not None else None)


def _epochs(config: Mapping[str, Any]) -> Any:
    return config.get("trainer", {}).get("max_epochs")
