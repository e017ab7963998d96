"""What a job does in its folder: nothing, go on from a checkpoint, or start; and whether a checkpoint is this run's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgrpo_lab.messages import one_line, show
from msgrpo_lab.runs.checkpoint import FOLDER, Snapshot, checkpoints, newest, read_checkpoint
from msgrpo_lab.runs.folder import CheckpointError, RunFolderError, RunRecord, read_record

FREE = (
    "callbacks",  # they look on, and may be added to a run or relaxed
    "checkpoint",
    "ckpt_path",
    "logger",
    "model.source.cache",
    "paths",
    "resume",
    "trainer.accelerator",
    "trainer.default_root_dir",
    "trainer.devices",
    "trainer.enable_",
    "trainer.log_every_n_steps",
)
"""Beginnings of the keys that a run may be continued with another value of."""
SHOWN = 5
"""Keys that a refusal names."""


def check_same_run(then: Mapping[str, Any], now: Mapping[str, Any], source: str) -> None:
    """Refuses to go on with a run under another configuration.

    The number of epochs is part of what a run is, because its learning rate falls over them; under
    `optim.schedule=constant` it may change.

    Args:
        then: the run's configuration, as plain values.
        now: the one that it is to go on with.
        source: what is refused, as in `resume=auto` or `ckpt_path=…`.

    Raises:
        CheckpointError: one line that names the keys.
    """
    differing = list(differences(then, now))
    if not differing:
        return
    named = ", ".join(f"{key} ({show(old)} then, {show(new)} now)" for key, old, new in differing[:SHOWN])
    more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    remedy = "give the values of then, or leave this out and start another run"
    if any(key == "trainer.max_epochs" for key, _, _ in differing):
        remedy += "; the learning rate falls over trainer.max_epochs unless optim.schedule=constant"
    raise CheckpointError(one_line(f"{source}: it is of another configuration: {named}{more}; {remedy}"))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The keys that matter and differ, with both values; an absent key and null are one."""
    old, new = dict(_leaves(then)), dict(_leaves(now))
    constant = old.get("optim.schedule") == new.get("optim.schedule") == "constant"
    for key in sorted(old.keys() | new.keys()):
        if key.startswith(FREE) or (key == "trainer.max_epochs" and constant):
            continue
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, list(tree) if isinstance(tree, tuple) else tree


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
