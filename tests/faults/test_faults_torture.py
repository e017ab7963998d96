"""Four real kills, and not a bit is lost. `make torture` does a hundred and more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(600)
def test_a_run_that_is_killed_four_times_equals_one_that_was_never_stopped() -> None:
    """In a process of its own: the fork server must come from a process without pytest's threads and modules."""
    done = subprocess.run(
        [sys.executable, str(HERE / "torture.py"), "--kills", "4", "--epochs", "8"],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith(("| frozenlake", "| snake"))]
    assert sum(int(row[3]) for row in rows[-2:]) >= 4
    assert sum(int(row[7]) for row in rows[-2:]) > 500, "metrics were compared"
