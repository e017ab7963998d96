"""Real learning runs: minutes, so marked slow (`make slow`)."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest


def _run(folder: Path, *overrides: str) -> dict[str, list[float]]:
    """Runs the main command with the CSV logger; returns each metric's values in order of logging."""
    command = [sys.executable, "-m", "msgrpo_lab.train", "logger=csv", f"logger.folder={folder}", *overrides]
    subprocess.run([*command, f"paths.outputs={folder}"], check=True, cwd=folder, capture_output=True, timeout=1700)
    values: dict[str, list[float]] = {}
    with next(folder.rglob("metrics.csv")).open() as stream:
        for row in csv.DictReader(stream):
            for name, value in row.items():
                if value:
                    values.setdefault(name, []).append(float(value))
    return values


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, 1])
def test_tiny_learns_frozen_lake_from_scratch(tmp_path: Path, seed: int) -> None:
    metrics = _run(tmp_path, "model=tiny", "env=frozenlake", f"seed={seed}")
    assert metrics["eval/frozenlake/greedy_success_rate"][0] < 0.1
    assert metrics["eval/frozenlake/greedy_success_rate"][-1] >= 0.5
    assert metrics["eval/frozenlake/success_rate"][-1] >= 0.5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_begins_to_learn_frozen_lake(tmp_path: Path) -> None:
    metrics = _run(tmp_path, "env=frozenlake", "trainer.max_epochs=32", "evaluation.every=32")
    assert metrics["eval/frozenlake/success_rate"][0] < 0.1
    assert metrics["eval/frozenlake/success_rate"][-1] >= 0.25
