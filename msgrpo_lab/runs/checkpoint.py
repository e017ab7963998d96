"""The checkpoint on disk: a folder of tensors (safetensors) and plain JSON, complete or not there at all.

    update-00000016/
        weights.safetensors     the trainable parameters by name, as they are after 16 updates
        optimizer.safetensors   the optimiser's state, `<number of the parameter>.<name>`
        best.safetensors        the trainable parameters at the best evaluation, unless these are they
        state.json              everything else: counters, schedule, callbacks, configuration
        manifest.json           length and SHA-256 of every file, and of itself

It is written under a temporary name in the same folder, synced, and renamed. Reading checks every byte first, so that a
damaged one is refused and never half loaded. Nothing is pickled. The checksums tell damage, not forgery: whoever can
write to the folder can write a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from msgrpo_lab.files import sync
from msgrpo_lab.runs.folder import CheckpointError

FORMAT = 1
"""Version of this layout; a reader refuses any other."""
WEIGHTS, OPTIMIZER, BEST, STATE, MANIFEST = (
    "weights.safetensors",
    "optimizer.safetensors",
    "best.safetensors",
    "state.json",
    "manifest.json",
)
TEMPORARY = "."
"""How the names of folders begin that are being written or deleted."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A run between two epochs: what a checkpoint holds."""

    weights: Tensors
    """Trainable parameters by their names in the policy."""
    optimizer: Tensors = field(default_factory=dict)
    state: dict[str, Any]
    """Plain JSON values; see `state.capture`."""
    best: Tensors | None = None
    """Trainable parameters at the best evaluation; None where there was none, or where they are `weights`."""

    @property
    def update(self) -> int:
        """Optimiser updates done."""
        return int(self.state["update"])

    @property
    def epoch(self) -> int:
        """Epochs done: the number of the next one."""
        return int(self.state["epoch"])


def folder_name(update: int) -> str:
    """The name of the checkpoint after `update` updates; names sort as the updates do."""
    return f"update-{update:08d}"


def write_checkpoint(parent: Path, snapshot: Snapshot) -> Path:
    """Writes a checkpoint into `parent`, in place of one of the same update.

    Returns:
        Its folder.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    parent.mkdir(parents=True, exist_ok=True)
    target = parent / folder_name(snapshot.update)
    temporary = parent / f"{TEMPORARY}{target.name}.{os.getpid()}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _fill(temporary, snapshot)
        if target.exists():
            replaced = parent / f"{TEMPORARY}{target.name}.{os.getpid()}.replaced"
            target.rename(replaced)
            try:
                temporary.rename(target)
            except BaseException:
                replaced.rename(target)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(parent)
    return target


def _fill(folder: Path, snapshot: Snapshot) -> None:
    tensors = {WEIGHTS: snapshot.weights, OPTIMIZER: snapshot.optimizer, BEST: snapshot.best}
    for name, values in tensors.items():
        if values is not None:
            _save(folder / name, values)
    (folder / STATE).write_bytes(_json(snapshot.state))
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        sync(path)
    (folder / MANIFEST).write_bytes(_manifest_bytes(files))
    sync(folder / MANIFEST)
    sync(folder)


def _save(path: Path, tensors: Tensors) -> None:
    try:
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path)
    except SafetensorError as error:  # which is what the library makes of a full disk
        raise OSError(f"{path.name}: {error}") from error


def _manifest_bytes(files: Mapping[str, Any]) -> bytes:
    """The manifest's one spelling, so that a change of any byte of it can be told."""
    content = {"format": FORMAT, "files": dict(files)}
    return _json({**content, "sha256": hashlib.sha256(_json(content)).hexdigest()})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def read_checkpoint(folder: Path) -> Snapshot:
    """A checkpoint whose every byte is as it was written. Tensors are on the CPU.

    Raises:
        CheckpointError: it is missing, damaged, incomplete, or of another format; the message names the file.
    """
    contents = _verified(folder)
    state = json.loads(contents[STATE])
    try:
        return Snapshot(
            weights=load(contents[WEIGHTS]),
            optimizer=load(contents[OPTIMIZER]),
            state=state,
            best=load(contents[BEST]) if BEST in contents else None,
        )
    except SafetensorError as error:  # what was written is what is read, so the writer was at fault
        raise CheckpointError(f"{folder}: its tensors cannot be read ({error}); use another checkpoint") from error


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, after the whole of it has been checked.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    state: dict[str, Any] = json.loads(_verified(folder)[STATE])
    return state


def _verified(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint by name, read once and found as the manifest says."""
    manifest = _read(folder / MANIFEST)
    try:
        listed = json.loads(manifest)
        form, files = listed["format"], dict(listed["files"])
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(folder / MANIFEST, "it is no manifest") from error
    if form != FORMAT:
        reason = f"its format is {form}, and this version reads {FORMAT}"
        raise CheckpointError(f"{folder / MANIFEST}: {reason}; use the version of msgrpo_lab that wrote it")
    if manifest != _manifest_bytes(files):
        raise _damaged(folder / MANIFEST, "its checksum is not its own")
    contents = {}
    for name, expected in files.items():
        contents[name] = _read(folder / name)
        if len(contents[name]) != expected["bytes"]:
            raise _damaged(folder / name, f"it has {len(contents[name])} bytes instead of {expected['bytes']}")
        if hashlib.sha256(contents[name]).hexdigest() != expected["sha256"]:
            raise _damaged(folder / name, "its checksum is not the manifest's")
    for name in (WEIGHTS, OPTIMIZER, STATE):
        if name not in contents:
            raise _damaged(folder / MANIFEST, f"it does not list {name}")
    return contents


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); give the folder of a whole checkpoint"
        ) from error


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged, {reason}; use another checkpoint")


log = logging.getLogger(__name__)

FOLDER = "checkpoints"
"""Where a run's checkpoints lie, in the run's folder."""
_NAME = re.compile(r"update-(\d{8,})")


def checkpoints(parent: Path) -> list[tuple[int, Path]]:
    """The updates and folders of the checkpoints in `parent`, oldest first; damaged ones too."""
    if not parent.is_dir():
        return []
    found = [(match, path) for path in parent.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found)


def newest(parent: Path, wanted: Callable[[Snapshot], bool] | None = None) -> tuple[Path, Snapshot] | None:
    """The newest sound checkpoint in `parent` that is `wanted`; None where there is none. Damaged ones are warned of.

    Args:
        parent: the folder that holds checkpoints.
        wanted: which ones will do; None takes any.

    Raises:
        CheckpointError: there are some, and none is sound.
    """
    damaged: CheckpointError | None = None
    for _, folder in reversed(checkpoints(parent)):
        try:
            snapshot = read_checkpoint(folder)
            if wanted is None or wanted(snapshot):
                return folder, snapshot
        except CheckpointError as error:
            log.warning("%s (the one before it is tried)", error)
            damaged = damaged or error
    if damaged is not None:
        raise CheckpointError(f"{parent}: none of the checkpoints is sound; the newest: {damaged}")
    return None


def prune(parent: Path, keep: Collection[int], last: int) -> None:
    """Deletes all checkpoints but the newest `last` and those of the updates in `keep`."""
    found = checkpoints(parent)
    for update, folder in found[: max(0, len(found) - last)]:
        if update not in keep:
            # Renamed first: a folder that is half deleted must not look like a checkpoint.
            doomed = folder.with_name(f"{TEMPORARY}{folder.name}.{os.getpid()}.deleting")
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(parent: Path) -> None:
    """Deletes what a process that was killed had not finished writing or deleting."""
    if parent.is_dir():
        for path in parent.glob(f"{TEMPORARY}update-*"):
            shutil.rmtree(path, ignore_errors=True)
