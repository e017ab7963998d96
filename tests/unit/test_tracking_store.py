"""The tracking store: which addresses are refused, and that it can be made by several jobs at once."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from msgrpo_lab.messages import mask
from msgrpo_lab.tracking import database as store
from msgrpo_lab.tracking.database import check_form, check_reachable, database_path, prepare_store

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///outputs/mlflow.db",
        "sqlite:////folder/mlflow.db",
        "http://localhost:5000",
        "https://tracking.example/path",
        "postgresql+psycopg://u:p@host/db",
        "mysql+pymysql://host/db",
    ],
)
def test_addresses_that_mlflow_writes_to_are_accepted(uri: str) -> None:
    check_form(uri)


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("./mlruns", "a folder, which MLflow 3 no longer writes to"),
        ("/folder/mlruns", "a folder"),
        ("file:///folder/mlruns", "a folder"),
        ("", "a folder"),
        ("ftp://host/x", "of an unknown scheme"),
        ("databricks", "a folder"),
        ("sqlite://mlflow.db", "three slashes"),
        ("sqlite:mlflow.db", "three slashes"),
        ("sqlite:///", "three slashes"),
        ("http://", "there is no host"),
    ],
)
def test_other_addresses_are_refused_in_one_line(uri: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        check_form(uri)
    text = str(caught.value)
    assert text.startswith(f"logger.tracking_uri={uri}: ")
    assert "\n" not in text
    assert "give sqlite:///folder/mlflow.db" in text


def test_a_password_is_not_repeated_in_an_error() -> None:
    with pytest.raises(ValueError, match=r"u:\*\*\*@host") as caught:
        check_form("ftp://u:hunter2@host/x")
    assert "hunter2" not in str(caught.value)
    assert mask("http://u:hunter2@host") == "http://u:***@host"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:///a/b.db", Path("a/b.db")),
        ("sqlite:////a/b.db", Path("/a/b.db")),
        ("sqlite:////a/b.db?timeout=3", Path("/a/b.db")),
        ("http://host", None),
    ],
)
def test_the_file_of_an_sqlite_address(uri: str, path: Path | None) -> None:
    assert database_path(uri) == path


def test_a_server_that_does_not_answer_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(ValueError, match="no server answers") as caught:
        check_reachable(f"http://127.0.0.1:{port}")
    assert "mlflow server" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_answers_is_accepted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        check_reachable(f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_checking_makes_nothing(tmp_path: Path) -> None:
    check_reachable(f"sqlite:///{tmp_path}/new/deep/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="nothing can be written in"):
        check_reachable(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; give a file in it"):
        check_reachable(f"sqlite:///{tmp_path}")


def test_another_file_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("these are notes, and must stay so")
    with pytest.raises(ValueError, match="is not an sqlite database"):
        prepare_store(f"sqlite:///{tmp_path}/notes.txt", "msgrpo")
    assert (tmp_path / "notes.txt").read_text() == "these are notes, and must stay so"


def test_the_store_is_made_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/deep/folder/mlflow.db"
    first = prepare_store(uri, "msgrpo")
    assert prepare_store(uri, "msgrpo") == first
    assert prepare_store(uri, "other") != first
    experiment = MlflowClient(uri).get_experiment(first)
    assert experiment.name == "msgrpo"
    assert experiment.artifact_location == (tmp_path / "deep/folder/artifacts").as_uri()
    assert not (tmp_path / "mlruns").exists(), "nothing goes to the working directory"
    with sqlite3.connect(tmp_path / "deep/folder/mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_deleted_experiment_is_told(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    experiment_id = prepare_store(uri, "msgrpo")
    MlflowClient(uri).delete_experiment(experiment_id)
    with pytest.raises(ValueError, match=r"logger\.experiment=msgrpo: the experiment is deleted; ") as caught:
        prepare_store(uri, "msgrpo")
    assert f"restore -x {experiment_id}" in str(caught.value)


JOB = """
import sys
from msgrpo_lab.tracking import database as store
from msgrpo_lab.tracking.database import prepare_store
from mlflow import MlflowClient
uri, name = sys.argv[1:]
experiment_id = prepare_store(uri, "msgrpo")
client = MlflowClient(uri)
run = client.create_run(experiment_id, run_name=name)
for step in range(25):
    client.log_metric(run.info.run_id, "x", float(step), step=step)
client.set_terminated(run.info.run_id)
print(experiment_id)
"""


def test_four_jobs_may_open_a_fresh_database_at_once(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/outputs/mlflow.db"
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, uri, f"job{number}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    finished = [job.communicate(timeout=240) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, finished
    (experiment_id,) = {out.strip() for out, _ in finished}
    client = MlflowClient(uri)
    runs = client.search_runs([experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["job0", "job1", "job2", "job3"]
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "x")
        assert [point.value for point in history] == [float(step) for step in range(25)], "nothing is lost"


def journal_trouble(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """sqlite answers the first `times` questions after the journal mode with an error; the list counts them all."""
    asked: list[int] = []
    plain = store._journal_mode

    def troubled(path: Path) -> str:
        asked.append(1)
        if len(asked) <= times:
            raise sqlite3.OperationalError("disk I/O error")
        return plain(path)

    monkeypatch.setattr(store, "_journal_mode", troubled)
    monkeypatch.setattr(store, "WAL_PAUSE_S", 0.0)
    return asked


def test_a_moments_trouble_with_the_journal_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = journal_trouble(monkeypatch, times=2)
    store._use_write_ahead_log(tmp_path / "runs.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "runs.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert len(asked) == 3
    assert not caplog.records


def test_a_journal_that_cannot_be_set_is_a_warning_and_no_lost_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = journal_trouble(monkeypatch, times=100)
    store._use_write_ahead_log(tmp_path / "runs.db")
    assert len(asked) == store.WAL_ATTEMPTS
    (record,) = caplog.records
    assert "disk I/O error" in record.getMessage()


READ = (
    "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT count(*) FROM t').fetchone(); c.close()"
)


def test_a_reader_elsewhere_leaves_the_log_to_a_run_that_is_under_way(tmp_path: Path) -> None:
    """A dashboard that is opened and closed during a sweep: the next job's checks must not drop the run's locks."""
    path = tmp_path / "runs.db"
    store._use_write_ahead_log(path)
    with contextlib.closing(sqlite3.connect(path)) as run:
        run.execute("CREATE TABLE t (x)")
        run.commit()
        check_reachable(f"sqlite:///{path}")
        subprocess.run([sys.executable, "-c", READ, str(path)], check=True, timeout=60)
        assert path.with_name("runs.db-wal").exists()
        run.execute("INSERT INTO t VALUES (1)")
        run.commit()
        count = (
            "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('SELECT count(*) FROM t').fetchone()[0])"
        )
        seen = subprocess.run(
            [sys.executable, "-c", count, str(path)], capture_output=True, text=True, timeout=60, check=True
        )
        assert seen.stdout.strip() == "1"
