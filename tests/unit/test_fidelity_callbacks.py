"""The meter and the rollout files in a run: what is logged, what is written, and that neither changes a number."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
from lab_made import fit, small_lab

from msgrpo_lab.callbacks.rollout_watchers import FidelityMeter, RolloutKeeper
from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.fidelity.meter import CREDIT_SCORES, DRAWN_SCORES, measure, yardstick_of
from msgrpo_lab.fidelity.rollout_file import load_rollout
from msgrpo_lab.fidelity.statistics import resample_groups

LAKE = ("env=frozenlake_slippery", "env.horizon=6", "rollout.num_groups=12", "sampler=abs_adv")


def credit_rows(memory: object) -> dict[int, dict[str, float]]:
    rows = {}
    for update, row in memory.rows:  # type: ignore[attr-defined]
        if found := {name: value for name, value in row.items() if name.startswith("credit/")}:
            rows[update] = found
    return rows


def test_the_meter_logs_its_scores_with_the_first_update_of_a_rollout(tmp_path: Path) -> None:
    """Every third rollout and the last one, and their numbers are those of the files."""
    meter = FidelityMeter(every=3, rules=["rloo", "exact"])
    keeper = RolloutKeeper(every=3)
    lab = small_lab(*LAKE, "credit=episode_return", "update.minibatches=2")
    rows = credit_rows(fit(lab, epochs=5, callbacks=[meter, keeper], folder=tmp_path))
    assert sorted(rows) == [0, 6, 8], "two updates a rollout; rollouts 0, 3 and 4"
    own = {f"credit/{name}{end}" for name in CREDIT_SCORES for end in ("", "_low", "_high")}
    drawn = {f"credit/drawn_{name}" for name in (*CREDIT_SCORES, *DRAWN_SCORES)}
    others = {f"credit/{rule}/{name}" for rule in ("rloo", "exact") for name in CREDIT_SCORES}
    assert set(rows[0]) == own | drawn | others
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())
    assert rows[6]["credit/exact/spearman"] == pytest.approx(1.0)
    assert rows[6]["credit/exact/wrong_sign"] == 0.0
    files = sorted((tmp_path / "rollouts").iterdir())
    assert [path.name for path in files] == [f"update_00000{n}.parquet" for n in (0, 6, 8)]
    for path, row in zip(files, rows.values(), strict=True):
        saved = load_rollout(path)
        assert saved.table is not None
        assert saved.table.exact
        yardstick = yardstick_of(saved.batch, saved.truth())
        np.testing.assert_allclose(yardstick.exact_ET, saved.batch.exact_adv, atol=1e-12)
        scores = measure(
            yardstick, EpisodeReturn(min_std=0.1)(saved.batch), resample_groups(12, 4, np.random.default_rng(0))
        )
        for name, score in scores.items():
            assert row[f"credit/{name}"] == pytest.approx(float(score.point_D[0]), abs=1e-9), name
        assert row["credit/spearman_low"] < row["credit/spearman"] < row["credit/spearman_high"]
    assert saved.origin["update"] == 8
    assert saved.origin["epoch"] == 4


def test_watching_changes_no_number_of_the_run(tmp_path: Path) -> None:
    plain = fit(small_lab(*LAKE), epochs=3).training()
    watched = fit(
        small_lab(*LAKE),
        epochs=3,
        callbacks=[FidelityMeter(every=1, parameter_space=True), RolloutKeeper(every=1)],
        folder=tmp_path,
    ).training()
    assert watched == plain


def test_the_parameter_cosine_is_logged_if_it_is_asked_for() -> None:
    (row,) = credit_rows(
        fit(small_lab(*LAKE), epochs=1, callbacks=[FidelityMeter(every=1, parameter_space=True)])
    ).values()
    assert -1 <= row["credit/parameter_cosine"] <= 1
    (row,) = credit_rows(fit(small_lab(*LAKE), epochs=1, callbacks=[FidelityMeter(every=1)])).values()
    assert "credit/parameter_cosine" not in row


def test_the_drawn_episodes_are_those_of_the_run() -> None:
    """The diagnostics of the meter's draw are the ones that the run itself has logged of its own."""
    memory = fit(small_lab(*LAKE), epochs=2, callbacks=[FidelityMeter(every=1)])
    for update, row in credit_rows(memory).items():
        (logged,) = [found for at, found in memory.rows if at == update and "sampler/ess" in found]
        for name in ("ess", "mean_advantage", "inclusion_bias"):
            assert row[f"credit/drawn_{name}"] == logged[f"sampler/{name}"]


def test_off_by_default(tmp_path: Path) -> None:
    lab = small_lab(*LAKE)
    memory = fit(lab, epochs=1, callbacks=[FidelityMeter(), RolloutKeeper()], folder=tmp_path)
    assert credit_rows(memory) == {}
    assert lab.data.truth is None, "nobody has asked the oracle"
    assert not (tmp_path / "rollouts").exists()


def test_a_game_without_an_oracle_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is measured; the rollouts are kept all the same, without action probabilities."""
    with caplog.at_level(logging.WARNING, logger="msgrpo_lab"):
        memory = fit(
            small_lab("env=snake"),
            epochs=2,
            callbacks=[FidelityMeter(every=1), RolloutKeeper(every=1)],
            folder=tmp_path,
        )
    assert credit_rows(memory) == {}
    told = [record.getMessage() for record in caplog.records if "oracle" in record.getMessage()]
    assert told == [
        "callbacks.fidelity.every=1: Snake has no oracle, so credit is not measured; set it to null, or train on "
        "env=frozenlake",
        "callbacks.rollouts.every=1: Snake has no oracle; its rollouts cannot be compared",
    ]
    assert load_rollout(tmp_path / "rollouts" / "update_000001.parquet").table is None


def test_an_undefined_score_is_not_logged() -> None:
    """Untrained on horizon 1, without shaping, no episode succeeds: no credit, and no correlation with it."""
    lab = small_lab("env=frozenlake", "env.horizon=1", "env.shaping=0", "rollout.num_groups=6")
    (row,) = credit_rows(fit(lab, epochs=1, callbacks=[FidelityMeter(every=1)])).values()
    assert not {"credit/spearman", "credit/pearson", "credit/gradient_cosine"} & set(row)
    assert all(math.isfinite(value) for value in row.values())


def test_a_rollout_that_cannot_be_written_costs_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rollouts").write_text("a file in the way")
    memory = fit(small_lab(), epochs=2, callbacks=[RolloutKeeper(every=1)], folder=tmp_path)
    assert len(memory.series("train/loss")) == 2
    lines = [r.getMessage() for r in caplog.records if "could not be written" in r.getMessage()]
    assert len(lines) == 2
    assert lines[0].startswith(f"{tmp_path}/rollouts/update_000000.parquet could not be written (")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FidelityMeter(every=0), r"^callbacks\.fidelity\.every=0: must be at least 1, or null for never"),
        (lambda: RolloutKeeper(every=-1), r"^callbacks\.rollouts\.every=-1: must be at least 1, or null for never"),
        (lambda: FidelityMeter(resamples=1), r"^callbacks\.fidelity\.resamples=1: must be at least 2"),
        (
            lambda: FidelityMeter(rules=["rlo"]),
            r"^callbacks\.fidelity\.rules=\[rlo\]: credit=rlo: no such option; did you mean 'rloo'\?",
        ),
        (lambda: RolloutKeeper(folder=" "), r"^callbacks\.rollouts\.folder=: must not be empty"),
        (lambda: RolloutKeeper(folder="/x"), r"^callbacks\.rollouts\.folder=/x: must lie in the run's folder, or the"),
        (lambda: RolloutKeeper(folder="~/x"), r"^callbacks\.rollouts\.folder=~/x: must lie in the run's folder"),
        (lambda: RolloutKeeper(folder="a/../../x"), r"^callbacks\.rollouts\.folder=a/\.\./\.\./x: must lie in"),
    ],
)
def test_mistaken_arguments(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]
