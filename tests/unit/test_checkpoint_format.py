"""A checkpoint comes back to the bit, or is refused with the file's name and the reason."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
import torch

from msgrpo_lab.runs import checkpoint as checkpoint_format
from msgrpo_lab.runs.checkpoint import (
    MANIFEST,
    STATE,
    WEIGHTS,
    CheckpointError,
    Snapshot,
    checkpoints,
    clear_leftovers,
    folder_name,
    newest,
    prune,
    read_checkpoint,
    read_state,
    write_checkpoint,
)


def snapshot(update: int = 3, *, best: bool = True) -> Snapshot:
    generator = torch.Generator().manual_seed(update)
    return Snapshot(
        weights={"a.b": torch.randn(3, 4, generator=generator), "c": torch.ones(2, dtype=torch.bfloat16)},
        optimizer={"0.step": torch.tensor(3.0), "0.exp_avg": torch.randn(3, 4, generator=generator)},
        state={"update": update, "epoch": update, "rate": 0.1 + 0.2, "never": float("-inf"), "names": ["x", None, "π"]},
        best={"a.b": torch.zeros(3, 4)} if best else None,
    )


def assert_same(read: Snapshot, written: Snapshot) -> None:
    assert read.state == written.state
    for ours, theirs in ((read.weights, written.weights), (read.optimizer, written.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert (read.best is None) == (written.best is None)


@pytest.mark.parametrize("best", [True, False])
def test_what_is_written_is_read(tmp_path: Path, best: bool) -> None:
    folder = write_checkpoint(tmp_path / "new", snapshot(best=best))
    assert folder == tmp_path / "new" / "update-00000003"
    assert_same(read_checkpoint(folder), snapshot(best=best))
    assert read_state(folder) == snapshot().state
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["update-00000003"], "nothing temporary is left"


def test_a_checkpoint_of_the_same_update_is_replaced(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, snapshot())
    folder = write_checkpoint(tmp_path, snapshot(best=False))
    assert_same(read_checkpoint(folder), snapshot(best=False))
    assert [path.name for path in tmp_path.iterdir()] == ["update-00000003"]


def test_any_flipped_byte_is_refused(tmp_path: Path) -> None:
    """500 positions over all files, the manifest among them, each with another bit or byte changed."""
    folder = write_checkpoint(tmp_path, snapshot())
    files = sorted(folder.iterdir())
    rng = random.Random(0)
    places = [(path, at) for path in files for at in range(path.stat().st_size)]
    manifest = [place for place in places if place[0].name == MANIFEST]
    for path, at in [*rng.sample(manifest, 150), *rng.sample(places, 350)]:
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + bytes([whole[at] ^ rng.randint(1, 255)]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=str(folder)) as refused:
            read_checkpoint(folder)
        assert "\n" not in str(refused.value)
        assert path.name in str(refused.value) or path.name == MANIFEST
        path.write_bytes(whole)
    assert_same(read_checkpoint(folder), snapshot())


@pytest.mark.parametrize("name", [MANIFEST, STATE, WEIGHTS])
@pytest.mark.parametrize("how", ["missing", "cut", "longer", "empty", "folder"])
def test_a_missing_or_cut_file_is_refused_by_name(tmp_path: Path, name: str, how: str) -> None:
    path = write_checkpoint(tmp_path, snapshot()) / name
    whole = path.read_bytes()
    path.unlink()
    match how:
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "longer":
            path.write_bytes(whole + b"\n")
        case "empty":
            path.write_bytes(b"")
        case "folder":
            path.mkdir()
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(path.parent)


def test_a_manifest_that_leaves_a_file_out_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, snapshot())
    files = json.loads((folder / MANIFEST).read_text())["files"]
    del files[STATE]
    (folder / MANIFEST).write_bytes(checkpoint_format._manifest_bytes(files))
    with pytest.raises(CheckpointError, match=r"does not list state\.json"):
        read_checkpoint(folder)


def test_a_checkpoint_of_another_format_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, snapshot())
    monkeypatch.setattr(checkpoint_format, "FORMAT", 2)
    with pytest.raises(CheckpointError, match="its format is 1, and this version reads 2"):
        read_checkpoint(folder)


def test_no_pickle_is_ever_opened(tmp_path: Path) -> None:
    """A file that would run code if it were unpickled is refused as damaged, and nothing has run."""
    folder = write_checkpoint(tmp_path, snapshot())
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(marker),)

    torch.save({"a.b": Evil()}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        read_checkpoint(folder)
    assert not marker.exists()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, snapshot())
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path, snapshot(best=False))
    assert_same(read_checkpoint(folder), snapshot())
    assert [path.name for path in tmp_path.iterdir()] == ["update-00000003"]


def test_a_rename_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, snapshot())
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith(".writing"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        write_checkpoint(tmp_path, snapshot(best=False))
    assert_same(read_checkpoint(folder), snapshot())
    assert [path.name for path in tmp_path.iterdir()] == ["update-00000003"]


def test_every_file_and_folder_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is renamed is on the disk: all files, then their folder, then the name in the folder above."""
    synced: list[str] = []
    real = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    folder = write_checkpoint(tmp_path / "c", snapshot())
    files = {path.name for path in folder.iterdir()}
    assert set(synced[: len(files)]) == files
    assert synced[len(files) :] == [f".update-00000003.{os.getpid()}.writing", "c"]


def test_the_newest_sound_one_is_taken_and_the_damaged_ones_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "absent") is None
    folders = [write_checkpoint(tmp_path, snapshot(update)) for update in (1, 2, 3)]
    (folders[2] / WEIGHTS).write_bytes(b"x")
    found = newest(tmp_path)
    assert found is not None
    assert found[0] == folders[1]
    assert_same(found[1], snapshot(2))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(folders[2] / WEIGHTS) in caplog.text
    for folder in folders:
        (folder / STATE).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="none of the checkpoints is sound"):
        newest(tmp_path)


def test_old_ones_go_and_the_best_stays(tmp_path: Path) -> None:
    for update in (0, 7, 100_000_000, 40, 9):
        write_checkpoint(tmp_path, snapshot(update))
    prune(tmp_path, keep={7}, last=2)
    assert [update for update, _ in checkpoints(tmp_path)] == [7, 40, 100_000_000]
    prune(tmp_path, keep=set(), last=9)
    assert len(checkpoints(tmp_path)) == 3


def test_what_a_killed_process_left_is_no_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, snapshot())
    for left in (".update-00000004.77.writing", ".update-00000001.77.deleting"):
        (tmp_path / left).mkdir()
        (tmp_path / left / WEIGHTS).write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    assert [update for update, _ in checkpoints(tmp_path)] == [3]
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", folder_name(3)]
