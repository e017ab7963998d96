"""Secrets that are planted in the environment and on the command line: none of them is printed, logged or kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from msgrpo_lab.messages import HIDDEN, ConfigError, looks_secret, redact_mistake, redact_text

ROOT = Path(__file__).parents[2]
PLANTED = {
    "HF_TOKEN": "hf_planted_4711",
    "OPENAI_API_KEY": "sk-planted-4712",
    "MLFLOW_TRACKING_PASSWORD": "planted-4713",
    "GITHUB_TOKEN": "ghp_planted_4714",
}


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "msgrpo_lab.train", *arguments, f"paths.outputs={folder}/outputs"],
        cwd=folder,
        env={**os.environ, **PLANTED, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def kept(folder: Path) -> bytes:
    """All that lies in a folder: databases, artifacts, configurations, logs."""
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_whole_run_keeps_no_secret_of_the_environment(tmp_path: Path) -> None:
    done = train(tmp_path, "debug=fast", "trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr
    everything = kept(tmp_path) + done.stdout.encode() + done.stderr.encode()
    assert b"num_episodes" in everything, "the configuration was kept, or there was nothing to look into"
    for secret in PLANTED.values():
        assert secret.encode() not in everything


@pytest.mark.parametrize(
    "override",
    [
        "logger.tracking_uri=http://me:planted-4715@127.0.0.1:1",
        "+engine.api_key=planted-4715",
        "+x.password=planted-4715",
    ],
)
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(override: str, tmp_path: Path) -> None:
    done = train(tmp_path, override)
    assert done.returncode == 2
    assert HIDDEN in done.stderr
    assert "planted" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_quotes_a_secret_of_the_environment_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    error = ConfigError([f"model.source.repo=a/b: the Hub answered 401 to {PLANTED['HF_TOKEN']}; log in"])
    assert PLANTED["HF_TOKEN"] not in str(error)
    assert PLANTED["HF_TOKEN"] not in redact_text(f"header: Bearer {PLANTED['HF_TOKEN']}")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("foo.api_key=abc: no such key; x", f"foo.api_key={HIDDEN}: no such key; x"),
        ("a=http://u:pw@h: no; x", f"a=http://u:{HIDDEN}@h: no; x"),
        ("a.token_budget=3: no; x", "a.token_budget=3: no; x"),
    ],
)
def test_the_value_of_a_secret_key_is_not_repeated_in_a_mistake(line: str, told: str) -> None:
    assert redact_mistake(line) == told


def test_the_name_of_a_variable_is_no_secret() -> None:
    assert looks_secret("remote.api_key")
    assert not looks_secret("remote.api_key_env")
