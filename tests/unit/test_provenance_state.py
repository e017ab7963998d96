"""Provenance says where a result comes from, and nothing that should stay secret."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from msgrpo_lab.messages import HIDDEN, has_password, redact, redact_mistake, redact_text
from msgrpo_lab.tracking import run as provenance
from msgrpo_lab.tracking.run import git_state, hardware, package_versions

PLANTED = "planted-value-91c3"


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=A", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit of two files."""
    git(tmp_path, "init", "-q", "-b", "trunk")
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / ".env").write_text("NAME=old\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    state = git_state(checkout)
    assert state.commit == git(checkout, "rev-parse", "HEAD")
    assert (state.branch, state.dirty, state.diff) == ("trunk", False, "")


def test_uncommitted_changes_are_kept(checkout: Path) -> None:
    (checkout / "code.py").write_text("x = 2\n")
    state = git_state(checkout)
    assert state.dirty
    assert "-x = 1" in state.diff
    assert "+x = 2" in state.diff


def test_staged_changes_are_kept_too(checkout: Path) -> None:
    (checkout / "code.py").write_text("x = 3\n")
    git(checkout, "add", "code.py")
    assert "+x = 3" in git_state(checkout).diff


def test_an_untracked_file_makes_it_dirty_without_being_copied(checkout: Path) -> None:
    (checkout / "new.py").write_text(PLANTED)
    state = git_state(checkout)
    assert state.dirty
    assert PLANTED not in state.diff


def test_secrets_do_not_travel_in_the_diff(checkout: Path) -> None:
    (checkout / ".env").write_text(f"NAME={PLANTED}\n")
    (checkout / "code.py").write_text(f'x = 2\nAPI_KEY = "{PLANTED}"\nhf_token: {PLANTED}\n')
    diff = git_state(checkout).diff
    assert "+x = 2" in diff
    assert PLANTED not in diff


def test_a_long_diff_is_cut_and_says_so(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "LONGEST_DIFF", 100)
    (checkout / "code.py").write_text("y = 1\n" * 200)
    diff = git_state(checkout).diff
    assert len(diff) < 200
    assert "[cut: " in diff


def test_a_folder_in_a_checkout_is_none_itself(checkout: Path) -> None:
    """An installed package, or a copy of the code, in the repository of something else."""
    (checkout / "inside").mkdir()
    assert git_state(checkout / "inside").commit is None
    assert git_state(None).commit is None


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    state = git_state(tmp_path / "nowhere")
    assert (state.commit, state.branch, state.dirty, state.diff) == (None, None, False, "")


def test_versions_are_those_of_the_installed_packages() -> None:
    versions = package_versions()
    assert versions["omegaconf"] == version("omegaconf")
    assert list(versions) == sorted(versions, key=str.lower)


def test_hardware_is_described_in_plain_values() -> None:
    described = hardware()
    assert described["cores"] >= 1
    assert 0.1 < described["memory_gb"] < 1e5
    assert json.loads(json.dumps(described)) == described


def test_no_environment_variable_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSGRPO_TEST_VARIABLE", PLANTED)
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    assert PLANTED not in json.dumps([hardware(), package_versions()])


@pytest.mark.parametrize(
    "key", ["api_key", "apikey", "openai_api_key", "hf_token", "token", "access_token", "password", "client_secret"]
)
def test_secret_looking_keys_are_hidden(key: str) -> None:
    assert redact({"engine": {key: PLANTED, "model": "m"}}) == {"engine": {key: HIDDEN, "model": "m"}}


@pytest.mark.parametrize(
    "key", ["token_budget", "max_new_tokens", "keyboard", "num_tokens", "tokenizer", "compass", "api_key_env"]
)
def test_other_keys_are_kept(key: str) -> None:
    assert redact({key: 8192}) == {key: 8192}


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("http://user:pw@host:5000", "http://user:***@host:5000"),
        ("postgresql+psycopg://u:pw@db/x", "postgresql+psycopg://u:***@db/x"),
        ("sqlite:////folder/mlflow.db", "sqlite:////folder/mlflow.db"),
        ("http://host:5000", "http://host:5000"),
        ("http://me:pl@nted77@h:1", "http://me:***@h:1"),
        ("http://me:planted/77@h:1", "http://me:***@h:1"),
        ("http://me@corp:planted77@h:1", "http://me@corp:***@h:1"),
        ("http://me:12345@h:1", "http://me:***@h:1"),
        ("mysql://h/db?user=me&password=planted77&x=1", "mysql://h/db?user=me&password=***&x=1"),
        ("http://h?api_key=planted77&token=planted78", "http://h?api_key=***&token=***"),
        ("http://h/?secret=planted77#top", "http://h/?secret=***#top"),
        ("http://host:5000/a@b?max_tokens=8&c:d@e", "http://host:5000/a@b?max_tokens=8&c:d@e"),
        ("http://[::1]:5000/a@b", "http://[::1]:5000/a@b"),
    ],
)
def test_passwords_in_addresses_are_hidden(value: str, kept: str) -> None:
    assert redact({"uri": [value]}) == {"uri": [kept]}
    assert has_password(value) == (value != kept)
    assert redact_mistake(f"uri={value} no") == f"uri={kept} no"


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        *(
            (name, PLANTED, True)
            for name in (
                "OPENAI_KEY",
                "WANDB_KEY",
                "DB_PASS",
                "MYSQL_PWD",
                "SSH_PASSPHRASE",
                "GITHUB_PAT",
                "AZURE_STORAGE_KEY",
                "SLACK_WEBHOOK",
                "SQL_CONNECTION_STRING",
            )
        ),
        ("SORT_KEY", "uniform", False),
        ("DB_PASS", "short", False),
        ("TLS_KEY", __file__, False),
        ("PWD", PLANTED, False),
        ("OLDPWD", PLANTED, False),
        ("KEYBOARD", PLANTED, False),
        ("TOOL_PATH", PLANTED, False),
    ],
)
def test_variables_are_known_as_secrets_by_their_names(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, secret: bool
) -> None:
    monkeypatch.setenv(name, value)
    assert redact_text(f"said {value} twice") == f"said {HIDDEN if secret else value} twice"


def test_a_secret_that_begins_like_another_leaves_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", PLANTED)
    monkeypatch.setenv("B_TOKEN", f"{PLANTED}-longer")
    assert redact_text(f"said {PLANTED}-longer") == f"said {HIDDEN}"


def test_an_unset_secret_shows_that_it_is_unset() -> None:
    assert redact({"api_key": None}) == {"api_key": None}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"engine.api_key={PLANTED}", f"engine.api_key={HIDDEN}"),
        (f"+engine.hf_token={PLANTED}", f"+engine.hf_token={HIDDEN}"),
        (f'"password": "{PLANTED}"', f'"password": {HIDDEN}'),
        ("update.token_budget=8192", "update.token_budget=8192"),
        ("sampler=uniform,abs_adv", "sampler=uniform,abs_adv"),
    ],
)
def test_secrets_in_text_are_hidden(text: str, kept: str) -> None:
    assert redact_text(text) == kept


def test_redacting_does_not_change_its_argument() -> None:
    config: dict[str, Any] = {"api_key": PLANTED, "list": [1, 2]}
    redact(config)
    assert config == {"api_key": PLANTED, "list": [1, 2]}
