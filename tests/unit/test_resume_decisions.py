"""What a job does in its folder: start, go on, leave a finished run alone, or refuse in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from msgrpo_lab.runs.checkpoint import FOLDER, WEIGHTS, Snapshot, write_checkpoint
from msgrpo_lab.runs.folder import (
    LOCK,
    RECORD,
    CheckpointError,
    RunFolderError,
    RunRecord,
    is_held,
    lock_folder,
    read_record,
)
from msgrpo_lab.runs.last_folder import digest, last_folder, remember
from msgrpo_lab.runs.resume import Beginning, beginning, differences

CONFIG: dict[str, Any] = {
    "seed": 0,
    "env": {"horizon": 8},
    "optim": {"lr": 0.1, "schedule": "linear"},
    "trainer": {"max_epochs": 4, "accelerator": "cpu"},
    "paths": {"outputs": "/here"},
    "callbacks": {"collapse": {"patience": 3}},
}


def config(**changes: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(CONFIG))
    for key, value in changes.items():
        node, *rest = key.split("__")
        if rest:
            changed[node][rest[0]] = value
        else:
            changed[node] = value
    return changed


def left(folder: Path, *updates: int, status: Any = "RUNNING", of: dict[str, Any] | None = None) -> Path:
    """A run's folder as a process left it, with checkpoints of one update an epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    RunRecord(status=status, run_id="abc", result=0.5, config=of or CONFIG).write(folder)
    for update in updates:
        state = {"update": update, "epoch": update, "config": of or CONFIG, "callbacks": {}}
        write_checkpoint(folder / FOLDER, Snapshot(weights={"w": torch.ones(2)}, state=state))
    return folder


def begin(folder: Path, now: dict[str, Any] = CONFIG, *, resume: str | None = "auto", ckpt: Any = None) -> Beginning:
    return beginning(folder, now, resume=None if ckpt else resume, ckpt_path=str(ckpt) if ckpt else None)


@pytest.mark.parametrize("resume", ["auto", None])
def test_an_empty_folder_is_a_start(tmp_path: Path, resume: str | None) -> None:
    assert str(begin(tmp_path, resume=resume)) == "run"
    assert begin(tmp_path / "absent", resume=resume) == Beginning()


@pytest.mark.parametrize("status", ["RUNNING", "KILLED", "FAILED"])
def test_a_run_that_was_left_goes_on_as_the_same_tracked_run(tmp_path: Path, status: str) -> None:
    begun = begin(left(tmp_path, 0, 3, status=status))
    assert begun.snapshot is not None
    assert (begun.snapshot.update, begun.run_id, str(begun)) == (3, "abc", "resume from update 3")


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_as_the_same_tracked_run(tmp_path: Path) -> None:
    begun = begin(left(tmp_path))
    assert (begun.snapshot, begun.run_id) == (None, "abc")


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    begun = begin(left(tmp_path, 4, status="FINISHED"))
    assert begun.finished is not None
    assert begun.finished.result == 0.5
    assert str(begun) == "skip (finished)"


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there is a run in it already; add resume=auto"):
        begin(left(tmp_path, 2), resume=None)


def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = left(tmp_path, 1, 2)
    (folder / FOLDER / "update-00000002" / WEIGHTS).write_bytes(b"")
    begun = begin(folder)
    assert begun.snapshot is not None
    assert begun.snapshot.update == 1
    assert "update-00000002/weights.safetensors: damaged" in caplog.text
    (folder / FOLDER / "update-00000001" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="none of the checkpoints is sound"):
        begin(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, r"seed \(0 then, 1 now\)"),
        ({"env__horizon": 9}, r"env\.horizon \(8 then, 9 now\)"),
        ({"env__slippery": True}, r"env\.slippery \(null then, true now\)"),
        ({"trainer__max_epochs": 8}, r"trainer\.max_epochs \(4 then, 8 now\).*optim\.schedule=constant"),
    ],
)
@pytest.mark.parametrize("status", ["FINISHED", "RUNNING"])
def test_another_configuration_is_refused_by_its_keys(
    tmp_path: Path, changes: dict[str, Any], named: str, status: str
) -> None:
    folder = left(tmp_path, 4, status=status)
    with pytest.raises(CheckpointError, match=named) as refused:
        begin(folder, config(**changes))
    assert "\n" not in str(refused.value)
    with pytest.raises(CheckpointError, match=named):
        begin(folder, config(**changes), ckpt=folder)


def test_what_does_not_decide_what_a_run_computes_may_change(tmp_path: Path) -> None:
    now = config(paths={"outputs": "/there"}, callbacks={}, resume="auto", trainer__accelerator="auto")
    assert begin(left(tmp_path, 2), now).snapshot is not None
    assert list(differences(CONFIG, now)) == []


def test_under_a_constant_rate_a_finished_run_may_be_made_longer(tmp_path: Path) -> None:
    constant = config(optim__schedule="constant")
    folder = left(tmp_path, 4, status="FINISHED", of=constant)
    longer = begin(folder, config(optim__schedule="constant", trainer__max_epochs=6))
    assert longer.finished is None
    assert longer.snapshot is not None
    assert begin(folder, constant).finished is not None


def test_a_named_checkpoint_is_taken(tmp_path: Path) -> None:
    folder = left(tmp_path / "run", 1, 2)
    last = begin(folder, ckpt=folder / FOLDER / "update-00000002")
    assert last.snapshot is not None
    assert (last.snapshot.update, last.run_id) == (2, "abc")
    newest = begin(folder, ckpt=folder)
    assert newest.snapshot is not None
    assert newest.snapshot.update == 2
    elsewhere = begin(tmp_path / "fork", ckpt=folder)
    assert elsewhere.snapshot is not None
    assert elsewhere.run_id is None, "in another folder it is another tracked run"
    with pytest.raises(RunFolderError, match="there is another run in it"):
        begin(left(tmp_path / "taken", 1), ckpt=folder)
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read"):
        begin(tmp_path / "fork", ckpt=tmp_path)


def test_an_older_checkpoint_goes_on_in_another_folder_only(tmp_path: Path) -> None:
    """In the run's own one, metrics and checkpoints of two histories would be mixed."""
    folder = left(tmp_path / "run", 1, 2, 3)
    older = folder / FOLDER / "update-00000002"
    with pytest.raises(RunFolderError, match=r"has gone on to update 3; give another hydra\.run\.dir=") as refused:
        begin(folder, ckpt=older)
    assert "\n" not in str(refused.value)
    assert begin(tmp_path / "fork", ckpt=older).run_id is None
    (folder / FOLDER / "update-00000003" / WEIGHTS).write_bytes(b"")
    assert begin(folder, ckpt=older).run_id == "abc", "it is the newest sound one now"


def test_a_damaged_record_is_told_in_one_line(tmp_path: Path) -> None:
    left(tmp_path, 1)
    for text in ("", "{", "[]", '{"status": "RUNNING", "other": 1}'):
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(RunFolderError, match=r"run\.json: cannot be read .*delete it"):
            read_record(tmp_path)


def test_two_processes_never_train_into_one_folder(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from msgrpo_lab.runs.folder import lock_folder
import sys
with lock_folder(Path({str(tmp_path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_held(tmp_path)
        with pytest.raises(RunFolderError, match="another process is training here"), lock_folder(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert not is_held(tmp_path), "the lock ends with the process"
    with lock_folder(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert not is_held(tmp_path / "absent")


def test_a_command_is_known_by_what_it_runs() -> None:
    def name(*overrides: str, sweeping: bool = False) -> str:
        return digest(overrides, config_name="train", sweeping=sweeping)

    known = name("env=snake", "seed=1")
    assert name("env=snake", "resume=auto", "seed=1", "hydra.run.dir=x", "ckpt_path=y", "+hydra.mode=RUN") == known
    assert len({known, name("seed=1", "env=snake"), name("env=snake"), name("env=snake", "seed=1", sweeping=True)}) == 4
    assert name("a=1", "hydra.verbose=true", "b=2") == name("hydra.verbose=true", "a=1", "b=2")


def test_a_command_finds_its_folder_again(tmp_path: Path) -> None:
    assert last_folder(tmp_path, "abc") is None
    folder = tmp_path / "run"
    remember(tmp_path, "abc", folder, ["env=snake"])
    assert last_folder(tmp_path, "abc") is None, "it is gone"
    folder.mkdir()
    assert last_folder(tmp_path, "abc") == folder
    (tmp_path / "commands" / "abc.json").write_text("{")
    assert last_folder(tmp_path, "abc") is None
