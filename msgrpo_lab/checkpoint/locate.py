"""Which checkpoints a run has, which of them to take, and which to let go."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from msgrpo_lab.checkpoint.errors import CheckpointError
from msgrpo_lab.checkpoint.format import TEMPORARY, Snapshot, read_checkpoint

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
