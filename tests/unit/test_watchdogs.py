"""Watchdogs: what is told and when, what stops a run, and what it goes back to."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from guard_made import SMALLEST, Run
from lab_made import Memory, fit, small_lab
from poison_made import At, nan_gradient, nan_parameter

from msgrpo_lab.callbacks.watchdogs import Watchdogs, WatchdogStop
from msgrpo_lab.runs.checkpoint import FOLDER, Snapshot, checkpoints, newest
from msgrpo_lab.training.state import trainable

HEALTHY = {
    "train/action_entropy": 1.0,
    "train/valid_action_rate": 1.0,
    "train/zero_std_groups": 0.2,
    "train/top_action_share": 0.5,
    "train/logprob_gap": 1e-6,
}
LIMITS = [
    ("train/action_entropy", 0.05, 0.01, "loss.entropy"),
    ("train/valid_action_rate", 0.5, 0.3, "rollout.sampling.constrain=true"),
    ("train/zero_std_groups", 0.9, 0.95, "rollout.group_size"),
    ("train/top_action_share", 0.98, 0.99, "one action has taken over"),
]


def told(watchdogs: Watchdogs) -> list[str]:
    """The lines of what is due at the end of this epoch, which then ends."""
    lines = [line for _, line in watchdogs._due]
    watchdogs._due = []
    return lines


@pytest.mark.parametrize(("metric", "limit", "value", "remedy"), LIMITS)
def test_a_lasting_collapse_is_told_once(metric: str, limit: float, value: float, remedy: str) -> None:
    watchdogs = Watchdogs(patience=3)
    for count in range(1, 8):
        watchdogs.observe(HEALTHY | {metric: value})
        lines = told(watchdogs)
        assert len(lines) == (count == 3)
        if lines:
            assert lines[0].startswith(f"callbacks.watchdogs.collapse=warn: {metric}={value:.3g} for 3 rollouts ")
            assert f"(limit {limit:g})" in lines[0]
            assert remedy in lines[0]
            assert "\n" not in lines[0]


@pytest.mark.parametrize(("metric", "limit", "value", "remedy"), LIMITS)
def test_the_limit_itself_is_no_breach(metric: str, limit: float, value: float, remedy: str) -> None:
    watchdogs = Watchdogs(patience=1)
    watchdogs.observe(HEALTHY | {metric: limit})
    assert told(watchdogs) == []


def test_a_gap_between_engine_and_trainer_is_told_at_once() -> None:
    watchdogs = Watchdogs(max_logprob_gap=0.2)
    watchdogs.observe(HEALTHY | {"train/logprob_gap": 0.2})
    assert told(watchdogs) == []
    watchdogs.observe(HEALTHY | {"train/logprob_gap": 0.21})
    (line,) = told(watchdogs)
    assert line.startswith(
        "callbacks.watchdogs.logprob_gap=warn: train/logprob_gap=0.21 (limit 0.2): the engine sampled"
    )


def test_a_recovery_in_between_starts_the_count_again() -> None:
    watchdogs = Watchdogs(patience=2)
    for entropy in (0.0, 1.0, 0.0, 1.0, 0.0):
        watchdogs.observe(HEALTHY | {"train/action_entropy": entropy})
    assert told(watchdogs) == []
    assert watchdogs.streaks.lengths["train/action_entropy"] == 1


def test_nan_and_what_is_not_logged_are_no_breach() -> None:
    watchdogs = Watchdogs(patience=1)
    watchdogs.observe(HEALTHY | {"train/action_entropy": math.nan})
    watchdogs.observe({})
    assert told(watchdogs) == []


def test_what_is_not_watched_is_not_told() -> None:
    watchdogs = Watchdogs(patience=1, collapse=None, logprob_gap=None)
    watchdogs.observe({metric: value for metric, _, value, _ in LIMITS} | {"train/logprob_gap": 9.0})
    assert told(watchdogs) == []


def test_a_resumed_run_neither_repeats_nor_forgets() -> None:
    collapsed = HEALTHY | {"train/action_entropy": 0.0}
    first = Watchdogs(patience=3)
    first.observe(collapsed)
    first.observe(collapsed)
    second = Watchdogs(patience=3)
    second.load_state_dict(first.state_dict())
    second.observe(collapsed)
    assert len(told(second)) == 1
    third = Watchdogs(patience=3)
    third.load_state_dict(second.state_dict())
    third.observe(collapsed)
    assert told(third) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_action_entropy", -0.1),
        ("max_logprob_gap", -1.0),
        ("max_logprob_gap", math.nan),
        ("min_valid_action_rate", 1.1),
        ("min_valid_action_rate", -0.1),
        ("max_zero_std_groups", 2),
        ("max_top_action_share", 1.5),
        ("patience", 0),
        ("max_roll_backs", -1),
        ("lr_factor", 0.0),
        ("lr_factor", 1.5),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^callbacks\.watchdogs\.{key}={value}: must "):
        Watchdogs(**{key: value})


def test_an_update_that_was_not_taken_is_told_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, trouble=At(2, nan_gradient), non_finite="warn", epochs=3)
    memory = run.fit()
    assert memory.series("train/watchdog_skipped_updates") == [0, 0, 1, 1, 1, 1]
    (line,) = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert line.startswith("callbacks.watchdogs.non_finite=warn: 1 update(s) not taken: ")


def test_a_poisoned_batch_stops_the_run_with_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, trouble=At(4, nan_gradient), non_finite="stop")
    with pytest.raises(WatchdogStop) as stopped:
        run.fit()
    assert stopped.value.code == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"msgrpo_lab: {stopped.value.reason}"
    assert line.startswith("msgrpo_lab: callbacks.watchdogs.non_finite=stop: 1 update(s) not taken")
    assert [update for update, _ in checkpoints(tmp_path / FOLDER)] == [2, 4], "those of the epochs before"
    assert (tmp_path / "adapter/last").is_dir()


@pytest.mark.parametrize("answer", ["warn", "stop"])
def test_a_parameter_that_is_not_finite_is_never_played_or_kept(tmp_path: Path, answer: str) -> None:
    run = Run(tmp_path, trouble=At(3, nan_parameter), non_finite=answer)
    with pytest.raises(WatchdogStop, match="3") as stopped:
        run.fit()
    assert "a parameter is not finite" in stopped.value.reason
    found = newest(tmp_path / FOLDER)
    assert found is not None
    assert found[1].update == 2
    assert all(bool(torch.isfinite(value).all()) for value in found[1].weights.values())


def test_a_parameter_that_is_not_finite_is_rolled_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, trouble=At(5, nan_parameter), non_finite="roll_back", lr_factor=0.25)
    memory = run.fit()
    assert all(bool(torch.isfinite(value).all()) for value in trainable(run.lab.policy).values())
    assert memory.series("train/watchdog_roll_backs") == [0, 0, 0, 0, 0, 0, 1, 1]
    assert "rolled back to update 2 at update 6 (1 of at most 3 times)" in caplog.text, (
        "update 4 made the epoch that went wrong"
    )
    plain = Run(tmp_path / "plain").fit().series("train/lr")
    assert memory.series("train/lr") == [*plain[:6], *(pytest.approx(rate / 4) for rate in plain[6:])]


class Collapsing(L.Callback):
    """Tells the watchdogs of a collapse in the rollouts of some epochs."""

    def __init__(self, epochs: set[int]) -> None:
        self.epochs = epochs

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        trainer.datamodule.metrics["train/action_entropy"] = 0.0 if trainer.current_epoch in self.epochs else 1.0


COLLAPSE: Mapping[str, Any] = {
    "collapse": "roll_back",
    "patience": 2,
    "max_zero_std_groups": 1.0,
    "max_top_action_share": 1.0,
    "min_valid_action_rate": 0.0,
}


def test_a_collapse_goes_back_to_the_last_policy_that_was_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Epochs 3 and 4 collapse; the policy of epoch 2 (4 updates) was the last that played well, and is kept for it."""
    run = Run(tmp_path, trouble=Collapsing({3, 4}), epochs=6, keep_last=1, **COLLAPSE)
    memory = run.fit()
    assert "rolled back to update 4 at update 10 " in caplog.text
    assert memory.series("train/collapse_causes") == [0, 0, 0, 1, 1, 0]
    assert run.watchdogs.roll_backs == 1
    assert run.watchdogs.streaks.lengths["train/action_entropy"] == 0


def test_roll_backs_are_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, trouble=Collapsing(set(range(9))), epochs=9, **{**COLLAPSE, "patience": 1, "max_roll_backs": 2})
    with pytest.raises(WatchdogStop) as stopped:
        run.fit()
    assert stopped.value.reason.endswith("(after 2 roll-backs)")
    assert caplog.text.count("rolled back to update 0 ") == 2
    assert run.lab.module.trainer.current_epoch == 2


def test_a_stop_goes_before_a_roll_back(tmp_path: Path) -> None:
    both = {**COLLAPSE, "patience": 1, "non_finite": "stop"}
    run = Run(tmp_path, trouble=At(2, nan_gradient), epochs=3, **both)
    run.callbacks.insert(0, Collapsing({1}))
    with pytest.raises(WatchdogStop, match="3") as stopped:
        run.fit()
    assert "non_finite=stop" in stopped.value.reason
    assert run.watchdogs.roll_backs == 0


def test_a_run_without_checkpoints_cannot_be_rolled_back() -> None:
    with pytest.raises(ValueError, match=r"callbacks\.watchdogs\.collapse=roll_back: this run keeps no checkpoints"):
        fit(small_lab(*SMALLEST), callbacks=[Watchdogs(collapse="roll_back")])


class Kill(L.Callback):
    """Ends the process in the middle of an epoch, as a signal would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise KeyError


def test_a_killed_run_rolls_back_like_one_that_was_not(tmp_path: Path) -> None:
    """Killed between the first sign of a collapse and the roll-back, and again after it."""

    def run_of(folder: Path, snapshot: Snapshot | None = None) -> Run:
        return Run(folder, trouble=Collapsing({1, 2, 3, 4}), snapshot=snapshot, epochs=6, keep_last=1, **COLLAPSE)

    def timeless(memory: Memory) -> dict[tuple[str, int], float]:
        return {
            (name, step): value
            for step, metrics in memory.rows
            for name, value in metrics.items()
            if not name.startswith("perf/") and name not in ("train/wall_s", "epoch")
        }

    whole = run_of(tmp_path / "whole")
    expected = timeless(whole.fit())
    assert whole.watchdogs.roll_backs == 2
    snapshot, metrics = None, {}
    for epoch in (2, 4, 6):
        part = run_of(tmp_path / "parts", snapshot)
        part.callbacks.append(Kill(epoch))
        if epoch == 6:
            part.fit()
        else:
            with pytest.raises(KeyError):
                part.fit()
        for point, value in timeless(part.memory()).items():
            assert metrics.setdefault(point, value) == value, point
        found = newest(tmp_path / "parts" / FOLDER)
        assert found is not None
        snapshot = found[1]
    assert metrics == expected
    assert all(torch.equal(v, trainable(part.lab.policy)[n]) for n, v in trainable(whole.lab.policy).items())
    assert part.watchdogs.state_dict() == whole.watchdogs.state_dict()


def test_the_metrics_of_every_rollout_are_looked_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two updates an epoch, one rollout: a streak counts rollouts. A warning ends nothing."""
    run = Run(tmp_path, trouble=Collapsing({1, 2, 3}), **{**COLLAPSE, "collapse": "warn", "patience": 3})
    run.fit()
    assert run.watchdogs.streaks.lengths["train/action_entropy"] == 3
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "entropy" in r.getMessage()]
    assert len(lines) == 1
