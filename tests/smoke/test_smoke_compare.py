"""From training to the table: a run keeps its rollout, and the other command judges every rule and sampler on it."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from lab_made import SMALL, fit, small_lab
from omegaconf import OmegaConf

from msgrpo_lab import compare as command
from msgrpo_lab.callbacks.rollout_watchers import FidelityMeter, RolloutKeeper
from msgrpo_lab.config.choices import options_of
from msgrpo_lab.fidelity.rollout_file import META, load_rollout
from msgrpo_lab.fidelity.table import COLUMNS, HEADINGS, OVER_BASE_CREDIT, OVER_BASE_SAMPLER

ROOT = Path(__file__).parents[2]
RUN = (
    "model=tiny",
    *SMALL,
    "debug=fast",
    "logger=csv",
    "env=frozenlake_slippery",
    "env.horizon=6",
    "trainer.max_epochs=1",
    "rollout.num_groups=12",
    "rollout.group_size=6",
    "evaluation.episodes=4",
    "evaluation.reference_simulations=4",
    "callbacks.rollouts.every=1",
    "callbacks.fidelity.every=1",
)
FEW = ("credit=all", "sampler=all", "draws=3", "resamples=30", "logger=null")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of one epoch, its rollout kept and measured."""
    folder = tmp_path_factory.mktemp("run")
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR")}
    done = subprocess.run(
        [sys.executable, "-m", "msgrpo_lab.train", *RUN, f"paths.outputs={folder}"],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def rollout(outputs: Path) -> Path:
    (path,) = outputs.rglob("*.parquet")
    return path


@pytest.fixture(scope="module")
def found(rollout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("found")
    command.main([f"rollouts={rollout}", f"output={folder}", *FEW])
    return folder


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "table.csv").open() as stream:
        return {(row["credit"], row["sampler"]): row for row in csv.DictReader(stream)}


def test_the_run_keeps_its_rollout_and_where_it_comes_from(rollout: Path) -> None:
    assert rollout.name == "update_000000.parquet"
    assert rollout.parent.name == "rollouts"
    saved = load_rollout(rollout)
    assert len(saved.batch.episodes) == 72
    assert saved.origin == json.loads(pq.read_schema(rollout).metadata[META])["origin"]
    assert {"env": "frozenlake_slippery", "model": "tiny", "credit": "episode_return"}.items() <= saved.origin.items()
    assert (saved.origin["seed"], saved.origin["epoch"], saved.origin["update"]) == (0, 0, 0)


def test_every_rule_is_measured_under_every_sampler(found: Path) -> None:
    rows = rows_of(found)
    assert set(rows) == {(rule, sampler) for rule in options_of("credit") for sampler in ("", *options_of("sampler"))}
    for (rule, sampler), row in rows.items():
        for name in ("spearman", "sign_agreement", "wrong_sign", "gradient_cosine", "sampled_cosine"):
            value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
            assert low <= value <= high, (rule, sampler, name)
        if rule == "exact":
            assert (row["spearman"], row["wrong_sign"], row["sampled_cosine"]) == ("1", "0", "1")
        if sampler:
            assert 0 < float(row["ess"]) <= 1
    assert all(float(row["spearman"]) < 1 for (rule, _), row in rows.items() if rule != "exact")


def test_both_tables_say_the_same(found: Path) -> None:
    """Each number of the Markdown is that of the CSV, rounded; what is not there is in neither."""
    rows, text = rows_of(found), (found / "table.md").read_text()
    assert "72 episodes, 12 groups, " in text
    assert "over 3 draws of 36 episodes" in text
    key_of = {HEADINGS.get(name, name): name for name in COLUMNS}
    seen = set()
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        heading, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        for line in lines:
            shown = dict(zip(heading, line, strict=True))
            cell = (shown.pop("credit"), shown.pop("sampler", ""))
            seen.add(cell)
            for name, number in shown.items():
                values = [rows[cell][f"{key_of[name]}{end}"] for end in ("", "_low", "_high")]
                if number in ("", "–"):
                    assert values[0] == "", (cell, name)
                    continue
                told = [float(part) for part in re.findall(r"-?\d+\.\d+", number)]
                assert told == pytest.approx([float(value) for value in values if value], abs=6e-4), (cell, name)
    assert seen == set(rows)


def test_differences_are_those_of_the_table_itself(found: Path) -> None:
    rows = rows_of(found)
    for (rule, sampler), row in rows.items():
        for name, base in ((OVER_BASE_CREDIT, ("episode_return", sampler)), (OVER_BASE_SAMPLER, (rule, "uniform"))):
            if row[name]:
                expected = float(row["gradient_cosine"]) - float(rows[base]["gradient_cosine"])
                assert float(row[name]) == pytest.approx(expected, abs=2e-5)


def test_the_figure_shows_every_rule_and_the_numbers_of_the_table(found: Path) -> None:
    assert (found / "fidelity.pdf").read_bytes()[:5] == b"%PDF-"
    assert (found / "fidelity.png").read_bytes()[1:4] == b"PNG"
    texts = Counter(re.findall(r">([^<>]*)</text>", (found / "fidelity.svg").read_text()))
    rows = rows_of(found)
    assert {rule for rule, _ in rows} <= set(texts)
    cosines = Counter(f"{float(row['gradient_cosine']):.2f}" for (_, sampler), row in rows.items() if sampler)
    assert cosines <= texts, cosines - texts


def test_the_same_command_gives_the_same_files_again(found: Path, rollout: Path, tmp_path: Path) -> None:
    command.main([f"rollouts={rollout}", f"output={tmp_path}", *FEW])
    for path in found.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_run_logged_what_the_command_finds(outputs: Path, rollout: Path, tmp_path: Path) -> None:
    """Of the rule with the run's own settings; points are equal, intervals have resamples of their own."""
    (config,) = outputs.rglob(".hydra/config.yaml")
    min_std = OmegaConf.load(config).credit.min_std
    own = ("credit=episode_return", f"credit.episode_return.min_std={min_std}", "sampler=null", "logger=null")
    command.main([f"rollouts={rollout}", f"output={tmp_path}", *own])
    (path,) = outputs.rglob("metrics.csv")
    with path.open() as stream:
        (logged,) = [row for row in csv.DictReader(stream) if row.get("credit/spearman")]
    row = rows_of(tmp_path)["episode_return", ""]
    for name in ("spearman", "pearson", "sign_agreement", "wrong_sign", "bias", "gradient_cosine", "sampled_cosine"):
        assert float(logged[f"credit/{name}"]) == pytest.approx(float(row[name]), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("decoding", ["true", "false"], ids=["constrained", "free"])
def test_exact_credit_trains_and_scores_one(decoding: str, tmp_path: Path) -> None:
    """With free decoding it is exact for the estimated policy, which is the one that the meter knows."""
    lab = small_lab(
        "env=frozenlake_slippery",
        "env.horizon=6",
        "credit=exact",
        f"rollout.sampling.constrain={decoding}",
        "rollout.sampling.max_new_tokens=2",
        "rollout.truth_completions=64",
    )
    memory = fit(lab, epochs=2, callbacks=[FidelityMeter(every=1), RolloutKeeper(every=2)], folder=tmp_path)
    rows = [row for _, row in memory.rows if "credit/spearman" in row]
    assert rows, "it is not defined where every answer is ⊥"
    for row in rows:
        assert all(math.isfinite(value) for name, value in row.items() if name.startswith("credit/"))
        assert row["credit/spearman"] == pytest.approx(1.0)
        assert row["credit/pearson"] == pytest.approx(1.0)
        assert row["credit/sampled_cosine"] == pytest.approx(1.0)
        assert row["credit/wrong_sign"] == row["credit/bias"] == 0.0
    kept = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert kept == ["update_000000.parquet", "update_000001.parquet"], "the first, and the last whatever the interval"
