"""`examples/`: what can be added passes the lab's own conformance tests, and the minimal loop learns."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples import minimal

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "examples" / "conf").glob("*/*.yaml"))


def run(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_example_passes_the_conformance_tests_of_its_kind(tmp_path: Path) -> None:
    """As a contributor has it who puts the YAML files into `conf/`."""
    for name in ("conf", "examples", "msgrpo_lab", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "examples" / "conf", tmp_path / "conf", dirs_exist_ok=True)
    chosen = " or ".join(NAMES)
    tests = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/conformance", "-k", chosen)
    done = run(*tests, folder=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = [line for line in done.stdout.splitlines() if " PASSED" in line]
    for name in NAMES:
        assert any(name in line for line in passed), name


def test_components_of_ones_own_folder_are_trained_with(tmp_path: Path) -> None:
    options = ["env=treasure", "model=tiny_qwen", "sampler=rank_adv", "credit=success_rate", "engine=one_by_one"]
    size = ["rollout.num_groups=2", "rollout.group_size=4", "sampler.num_episodes=4", "trainer.max_epochs=1"]
    rest = ["sampling=constrained", "logger=csv", "evaluation.episodes=2", f"paths.outputs={tmp_path}"]
    done = run("-m", "msgrpo_lab.train", "--config-dir", "examples/conf", *options, *size, *rest)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("adapter/last")), "the run has ended"


def test_the_minimal_loop_learns(capsys: pytest.CaptureFixture[str]) -> None:
    scores = minimal.main(updates=8)
    assert max(scores[4:]) > 3 * max(scores[0], 0.01), scores
    assert "reward" in capsys.readouterr().out
