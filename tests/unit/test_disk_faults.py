"""A disk that takes no more: training goes on, what is there stays whole, and the end is one line.

The operating system itself refuses: no file may grow beyond a limit, as on a full disk.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from guard_made import Run

from msgrpo_lab.runs.checkpoint import FOLDER, checkpoints, read_checkpoint
from msgrpo_lab.runs.folder import RunFolderError
from msgrpo_lab.training.state import trainable


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Full(L.Callback):
    """The disk is full while these epochs last, to the end of their checkpoints."""

    def __init__(self, epochs: set[int], size: int) -> None:
        self.epochs, self.size = epochs, size
        self.stack = contextlib.ExitStack()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.stack.close()
        if trainer.current_epoch in self.epochs:
            self.stack.enter_context(files_of_at_most(self.size))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.stack.close()


@pytest.mark.parametrize("size", [1_000, 60_000, 200_000], ids=["at-once", "in-the-weights", "in-the-optimiser"])
def test_a_full_disk_costs_no_training_and_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    """Epochs 1 and 2 cannot be kept; those before stay, and the next is kept again."""
    seen: list[list[int]] = []

    class Look(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append([update for update, _ in checkpoints(tmp_path / "full" / FOLDER)])
            for _, folder in checkpoints(tmp_path / "full" / FOLDER):
                read_checkpoint(folder)

    run = Run(tmp_path / "full", trouble=Full({1, 2}, size))
    run.callbacks.append(Look())
    run.fit()
    assert seen == [[0], [0, 2], [0, 2], [0, 2]]
    assert [update for update, _ in checkpoints(tmp_path / "full" / FOLDER)][-1] == 8
    assert caplog.text.count("could be written") == 2
    names = {path.name for path in (tmp_path / "full" / FOLDER).iterdir()}
    assert all(name.startswith("update-") for name in names), "nothing half written is left"
    whole = Run(tmp_path / "whole")
    whole.fit()
    assert all(torch.equal(v, trainable(whole.lab.policy)[n]) for n, v in trainable(run.lab.policy).items())


def test_a_folder_that_takes_no_checkpoint_costs_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).write_text("a file in the way")
    memory = Run(tmp_path, epochs=2).fit()
    assert len(memory.series("train/loss")) == 4
    assert caplog.text.count("could be written") == 3, "update 0 and two epochs"


def test_an_adapter_that_cannot_be_written_is_told_in_one_line_and_leaves_the_earlier_one(tmp_path: Path) -> None:
    run = Run(tmp_path, epochs=1)
    run.fit()
    kept = {path.name: path.read_bytes() for path in (tmp_path / "adapter/last").iterdir()}
    with files_of_at_most(60_000), pytest.raises(RunFolderError) as refused:
        run.adapter.keep(run.lab.policy, [])
    line = str(refused.value)
    assert line.startswith(f"{tmp_path}/adapter: the adapter could not be written (")
    assert "resume=auto" in line
    assert "\n" not in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter/last").iterdir()} == kept
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", FOLDER}
