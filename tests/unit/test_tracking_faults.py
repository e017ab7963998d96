"""A tracking store that fails: what is logged waits on disk, nothing is lost and nothing written twice."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from omegaconf import OmegaConf
from sqlalchemy import event

from msgrpo_lab import upload
from msgrpo_lab.runs.folder import is_held, lock_folder
from msgrpo_lab.tracking import outbox as outbox_module
from msgrpo_lab.tracking.logger import RunLogger
from msgrpo_lab.tracking.outbox import (
    Artifact,
    End,
    Metrics,
    Outbox,
    Owner,
    Point,
    Spool,
    Tag,
    entry_of,
    merge,
    read_spool,
)
from msgrpo_lab.tracking.run import STOPPED_TAG
from msgrpo_lab.tracking.tracking import MLflowTracking, finish_run

CONFIG = OmegaConf.create({"seed": 0})


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables, to be copied: making one takes seconds."""
    path = tmp_path_factory.mktemp("blank") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


@pytest.fixture
def store(tmp_path: Path, blank: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of this test's own; attempts do not wait."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outbox_module, "PAUSE_S", 0.0)
    path = tmp_path / "store" / "mlflow.db"
    path.parent.mkdir()
    shutil.copy(blank, path)
    yield path
    finish_run("KILLED")


def tracking_of(store: Path) -> MLflowTracking:
    return MLflowTracking(tracking_uri=f"sqlite:///{store}", log_system_metrics=False)


def logger_of(tracking: MLflowTracking, run_id: str | None = None) -> RunLogger:
    logger = tracking.start(CONFIG, run_id)
    assert isinstance(logger, RunLogger)
    return logger


def history(store: Path, run_id: str | None, key: str) -> list[tuple[int, float]]:
    assert run_id is not None
    points = MlflowClient(f"sqlite:///{store}").get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


@contextlib.contextmanager
def locked(store: Path) -> Iterator[None]:
    """Another process writes for as long as the block lasts."""
    with contextlib.closing(sqlite3.connect(store, isolation_level=None, timeout=30)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


def impatient(logger: RunLogger) -> None:
    """MLflow waits 20 s for a lock; this test does not."""

    @event.listens_for(logger.experiment._tracking_client.store.engine, "before_cursor_execute", retval=True)
    def _(connection: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> tuple[str, Any]:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 50"), parameters


def test_a_locked_database_costs_nothing(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracking = tracking_of(store)
    logger = logger_of(tracking)
    impatient(logger)
    logger.log_metrics({"x": 0.0}, 0)
    outbox = logger.outbox
    assert outbox is not None
    with locked(store):
        for step in range(1, 6):
            logger.log_metrics({"x": float(step), "y": math.nan}, step)
        assert outbox.waiting
        assert len(read_spool(outbox.spool.path)[1]) == 5
    assert "does not take what is logged" in caplog.text
    assert "database is locked" in caplog.text
    outbox._probe_at = 0.0
    logger.log_metrics({"x": 6.0}, 6)
    assert not outbox.waiting
    assert not outbox.spool.path.exists()
    tracking.finish("FINISHED")
    assert history(store, logger.run_id, "x") == [(step, float(step)) for step in range(7)]
    assert len(history(store, logger.run_id, "y")) == 5


def test_a_moments_lock_is_waited_for(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = tracking_of(store)
    logger = logger_of(tracking)
    impatient(logger)
    waited: list[float] = []
    with contextlib.ExitStack() as lock:
        lock.enter_context(locked(store))

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            lock.close()

        monkeypatch.setattr(time, "sleep", sleep)
        monkeypatch.setattr(outbox_module, "PAUSE_S", 0.25)
        logger.log_metrics({"x": 1.0}, 1)
    assert waited == [0.25]
    assert logger.outbox is not None
    assert not logger.outbox.waiting
    assert history(store, logger.run_id, "x") == [(1, 1.0)]


def test_a_corrupt_database_costs_nothing(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The database is overwritten while a run logs; put back, it takes the rest from the command."""
    tracking = tracking_of(store)
    logger = logger_of(tracking)
    logger.log_metrics({"x": 0.0}, 0)
    (store.parent / "adapter").mkdir()
    (store.parent / "adapter/weights").write_text("trained")
    logger.experiment._tracking_client.store.engine.dispose()
    good = store.parent / "good.db"
    with contextlib.closing(sqlite3.connect(store)) as source, contextlib.closing(sqlite3.connect(good)) as copy:
        source.backup(copy)
    for name in ("mlflow.db-wal", "mlflow.db-shm"):
        store.with_name(name).unlink(missing_ok=True)
    store.write_bytes(b"\0" * 100_000)
    for step in range(1, 4):
        logger.log_metrics({"x": float(step)}, step)
    logger.log_artifact(store.parent / "adapter", "adapter")
    logger.set_tag("why", "because")
    tracking.finish("FINISHED")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("msgrpo_lab: ")]
    assert "not a database" in line
    folder = Path.cwd()
    assert line.endswith(f"upload it with python -m msgrpo_lab.upload {folder}")
    (spool,) = folder.glob("spool-*.jsonl")
    before = spool.read_bytes()

    with pytest.raises(SystemExit) as refused:
        upload.main([str(folder)])
    assert refused.value.code == 1
    assert spool.read_bytes() == before
    assert str(spool.name) not in capsys.readouterr().out

    store.write_bytes(good.read_bytes())
    with pytest.raises(SystemExit) as done:
        upload.main([str(folder)])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"{spool}: 3 metric points written\n"
    assert not spool.exists()
    assert history(store, logger.run_id, "x") == [(step, float(step)) for step in range(4)]
    client = MlflowClient(f"sqlite:///{store}")
    run = client.get_run(str(logger.run_id))
    assert run.info.status == "FINISHED"
    assert run.data.tags["why"] == "because"
    kept = client.download_artifacts(str(logger.run_id), "adapter/weights")
    assert Path(kept).read_text() == "trained"


def test_uploading_twice_writes_once(store: Path) -> None:
    tracking = tracking_of(store)
    logger = logger_of(tracking)
    logger.log_metrics({"x": 0.5}, 0)
    tracking.finish("FINISHED")
    spool = Spool(Path.cwd(), Owner(f"sqlite:///{store}", str(logger.run_id)))
    spool.append(Metrics((Point("x", 0.7, 1, 0), Point("x", 1.0, 2, 1))))
    kept = spool.path.read_bytes()
    assert upload.upload(spool.path) == 1, "step 0 is there already"
    spool.path.write_bytes(kept)
    assert upload.upload(spool.path) == 0
    assert history(store, logger.run_id, "x") == [(0, 0.5), (1, 1.0)]


def test_a_delivery_that_broke_off_is_made_again_without_doubles(store: Path) -> None:
    """The store took the first batch and failed at the tag: the next flush starts from the beginning."""
    tracking = tracking_of(store)
    logger = logger_of(tracking)
    outbox = logger.outbox
    assert outbox is not None
    metrics = Metrics((Point("x", 1.0, 123, 0), Point("x", 2.0, 124, 1)))
    metrics.deliver(outbox.client, outbox.run_id)
    outbox.spool.append(metrics)
    outbox.spooled = True
    assert outbox.flush()
    assert history(store, logger.run_id, "x") == [(0, 1.0), (1, 2.0)]


def test_a_continued_run_goes_on_and_repeats_no_step(store: Path) -> None:
    tracking = tracking_of(store)
    first = logger_of(tracking)
    for step in range(4):
        first.log_metrics({"train/loss": float(step)}, step)
    spool = Spool(Path.cwd(), Owner(f"sqlite:///{store}", str(first.run_id)))
    spool.append(Metrics((Point("train/loss", 4.0, 1, 4),)))
    finish_run("KILLED")  # the process dies here: its spool stays

    second = logger_of(tracking, first.run_id)
    assert second.run_id == first.run_id
    client = MlflowClient(f"sqlite:///{store}")
    assert client.get_run(str(first.run_id)).info.status == "RUNNING"
    for step in range(2, 7):
        second.log_metrics({"train/loss": float(step), "train/new": 1.0}, step)
    tracking.finish("FINISHED")
    run = client.get_run(str(first.run_id))
    assert run.info.status == "FINISHED"
    assert run.data.tags["msgrpo.resumed"] == "1"
    assert history(store, first.run_id, "train/loss") == [(step, float(step)) for step in range(7)]
    assert [step for step, _ in history(store, first.run_id, "train/new")] == [2, 3, 4, 5, 6]


def test_points_that_still_wait_are_known_to_a_continued_run(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = tracking_of(store)
    first = logger_of(tracking)
    spool = Spool(Path.cwd(), Owner(f"sqlite:///{store}", str(first.run_id)))
    spool.append(Metrics((Point("x", 1.0, 1, 1),)))
    finish_run("KILLED")
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "flush", lambda _: False)
        second = logger_of(tracking, first.run_id)
        second.log_metrics({"x": 1.0}, 1)
        second.log_metrics({"x": 2.0}, 2)
    tracking.finish("FINISHED")
    assert history(store, first.run_id, "x") == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("answers", [True, False])
def test_an_end_that_was_never_delivered_does_not_close_a_continued_run(
    store: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """Whether the store answers when the run is continued, or only later."""
    tracking = tracking_of(store)
    first = logger_of(tracking)
    first.set_tag(STOPPED_TAG, "a watchdog")
    spool = Spool(Path.cwd(), Owner(f"sqlite:///{store}", str(first.run_id)))
    for entry in (Metrics((Point("x", 1.0, 1, 1),)), Tag(STOPPED_TAG, "a watchdog"), End("KILLED", 2)):
        spool.append(entry)
    finish_run("KILLED")
    client = MlflowClient(f"sqlite:///{store}")
    with monkeypatch.context() as patch:
        if not answers:
            patch.setattr(Outbox, "flush", lambda _: False)
        second = logger_of(tracking, first.run_id)
    assert STOPPED_TAG not in client.get_run(str(first.run_id)).data.tags
    assert second.outbox is not None
    assert second.outbox.flush()
    run = client.get_run(str(first.run_id))
    assert run.info.status == "RUNNING"
    assert STOPPED_TAG not in run.data.tags
    assert history(store, first.run_id, "x") == [(1, 1.0)]


def test_the_spool_of_a_run_that_is_going_is_left_alone(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logger_of(tracking_of(store))
    spool = Spool(Path.cwd(), Owner(f"sqlite:///{store}", str(logger.run_id)))
    spool.append(Metrics((Point("x", 1.0, 1, 1),)))
    before = spool.path.read_bytes()
    with lock_folder(Path.cwd()), pytest.raises(SystemExit) as done:
        upload.main([str(Path.cwd())])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"{spool.path}: left alone, the run is still going and delivers it itself\n"
    assert spool.path.read_bytes() == before


def test_a_folder_is_held_while_its_spool_is_uploaded(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logger_of(tracking_of(store))
    spool = Spool(Path.cwd(), Owner(f"sqlite:///{store}", str(logger.run_id)))
    spool.append(Metrics((Point("x", 1.0, 1, 1),)))
    seen: list[bool] = []
    deliver = Metrics.deliver

    def look(entry: Metrics, client: MlflowClient, run_id: str) -> None:
        seen.append(is_held(Path.cwd()))
        deliver(entry, client, run_id)

    monkeypatch.setattr(Metrics, "deliver", look)
    assert upload.upload(spool.path) == 1
    assert seen == [True]
    assert upload.upload(spool.path) == 0, "delivered meanwhile"


def test_a_run_that_is_not_there_cannot_be_continued(store: Path) -> None:
    with pytest.raises(ValueError, match=r"run 0123: MLflow cannot continue it \(.*\); restore it, or start afresh"):
        tracking_of(store).start(CONFIG, "0123")


def test_a_run_whose_origin_was_never_written_gets_it_when_it_is_continued(store: Path) -> None:
    tracking = tracking_of(store)
    first = logger_of(tracking)
    client = MlflowClient(f"sqlite:///{store}")
    client.delete_tag(str(first.run_id), "msgrpo.commit")
    finish_run("KILLED")
    logger_of(tracking, first.run_id)
    assert "msgrpo.commit" in client.get_run(str(first.run_id)).data.tags


ENTRIES = (
    Metrics((Point("a", 1.5, 10, 0), Point("b", math.inf, 10, 0), Point("c", -math.inf, 10, 2**40))),
    Artifact("/somewhere/é", "adapter"),
    Tag("why", 'two\nlines and "quotes"'),
    End("KILLED", 11),
)


def test_a_spool_gives_back_what_it_was_given(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "new" / "folder", Owner("http://host", "abc"))
    for entry in ENTRIES:
        spool.append(entry)
    assert spool.entries() == list(ENTRIES)
    assert Spool(tmp_path / "new" / "folder", spool.owner).entries() == list(ENTRIES)
    for line in spool.path.read_bytes().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_nan_survives_the_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path, Owner("http://host", "abc"))
    spool.append(Metrics((Point("a", math.nan, 10, 0),)))
    (entry,) = spool.entries()
    assert isinstance(entry, Metrics)
    assert math.isnan(entry.points[0].value)


def test_half_a_line_of_a_process_that_died_is_cut_off(tmp_path: Path) -> None:
    owner = Owner("http://host", "abc")
    spool = Spool(tmp_path, owner)
    spool.append(ENTRIES[0])
    spool.append(ENTRIES[2])
    whole = spool.path.read_bytes()
    for cut in range(len(whole)):
        spool.path.write_bytes(whole[:cut])
        later = Spool(tmp_path, owner)
        later.append(ENTRIES[3])
        found = later.entries()
        assert found == [entry for entry in (ENTRIES[0], ENTRIES[2]) if entry in found] + [ENTRIES[3]]
        assert len(found) == 1 + whole[:cut].count(b"\n") - (whole[:cut].count(b"\n") > 0)


def test_a_damaged_line_is_told_with_its_number(tmp_path: Path) -> None:
    spool = Spool(tmp_path, Owner("http://host", "abc"))
    spool.append(ENTRIES[0])
    spool.append(ENTRIES[2])
    spool.path.write_bytes(spool.path.read_bytes().replace(b'"kind": "metrics"', b'"kind": "?"'))
    with pytest.raises(ValueError, match=rf"{spool.path}: line 2 cannot be read .*; mend or remove the line"):
        spool.entries()
    with pytest.raises(ValueError, match="line 2 cannot be read"):
        upload.upload(spool.path)


def test_a_line_that_a_full_disk_cut_short_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path, Owner("http://host", "abc"))
    spool.append(ENTRIES[0])
    before, write = spool.path.read_bytes(), os.write

    def full(file: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:20])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            spool.append(ENTRIES[1])
    assert spool.path.read_bytes() == before
    spool.append(ENTRIES[1])
    assert spool.entries() == [ENTRIES[0], ENTRIES[1]]


def test_what_no_disk_takes_is_held_and_written_later(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store and spool lie on one full disk; then there is space for the spool, then the store answers again."""
    tracking = tracking_of(store)
    logger = logger_of(tracking)
    outbox = logger.outbox
    assert outbox is not None

    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as no_store:
        no_store.setattr(outbox, "client", type("Full", (), {"log_batch": full})())
        with monkeypatch.context() as no_disk:
            no_disk.setattr(os, "write", full)
            logger.log_metrics({"x": 1.0}, 1)
            logger.log_metrics({"x": 2.0}, 2)
            assert len(outbox.unwritten) == 2
        logger.log_metrics({"x": 3.0}, 3)
        assert outbox.unwritten == []
        assert len(outbox.spool.entries()) == 3
    tracking.finish("FINISHED")
    assert history(store, logger.run_id, "x") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_the_store_is_asked_again_with_growing_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "PAUSE_S", 0.0)
    now, calls = [1000.0], []

    class Down:
        def set_tag(self, *arguments: Any) -> None:
            calls.append(now[0])
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    client: Any = Down()
    outbox = Outbox(client, "abc", Spool(tmp_path, Owner("http://host", "abc")))
    for second in range(2000):
        now[0] = 1000.0 + second
        outbox.send(Tag("n", str(second)))
    pauses = [later - earlier for earlier, later in itertools.pairwise(calls) if later > earlier]
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300, 300, 300, 300]
    assert calls[:3] == [1000.0] * 3
    assert len(outbox.spool.entries()) == 2000


def test_a_password_is_neither_spooled_nor_guessed(tmp_path: Path) -> None:
    spool = Spool(tmp_path, Owner("http://me:***@127.0.0.1:1", "abc"))
    spool.append(ENTRIES[2])
    with pytest.raises(ValueError, match=r"the password of .* is not kept in files; give --tracking-uri"):
        upload.upload(spool.path)
    with pytest.raises(ValueError, match="no server answers"):
        upload.upload(spool.path, "http://me:hunter2@127.0.0.1:1")


def test_uploading_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        upload.main([str(tmp_path)])
    assert (done.value.code, capsys.readouterr().out) == (0, "nothing waits to be uploaded\n")
    with pytest.raises(SystemExit) as refused:
        upload.main([str(tmp_path / "nosuch")])
    assert refused.value.code == 2
    assert (
        capsys.readouterr().err
        == f"msgrpo_lab: {tmp_path}/nosuch: there is no such folder; give a run's or a sweep's\n"
    )


@pytest.mark.parametrize(
    "value", [{}, {"kind": "nosuch"}, {"kind": "tag"}, {"kind": "metrics", "points": [[1]]}, [], 3]
)
def test_what_is_no_entry_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"entry of a run|unpack"):
        entry_of(value)


def test_neighbouring_points_are_put_together() -> None:
    a, b, c = (Point("x", float(n), n, n) for n in range(3))
    assert list(merge([Metrics((a,)), Metrics((b,)), Tag("k", "v"), Metrics((c,))])) == [
        Metrics((a, b)),
        Tag("k", "v"),
        Metrics((c,)),
    ]
