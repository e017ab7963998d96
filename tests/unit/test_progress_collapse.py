"""Collapse warnings: once a cause, only when it lasts, and never the end of a run."""

from __future__ import annotations

import logging
import math

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from msgrpo_lab.callbacks.collapse import CollapseMonitor

HEALTHY = {"train/action_entropy": 1.0, "train/valid_action_rate": 1.0, "train/zero_std_groups": 0.2}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("metric", "value", "remedy"),
    [
        ("train/action_entropy", 0.01, "loss.entropy"),
        ("train/valid_action_rate", 0.3, "rollout.sampling.constrain=true"),
        ("train/zero_std_groups", 0.95, "rollout.group_size"),
    ],
)
def test_a_lasting_cause_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, metric: str, value: float, remedy: str
) -> None:
    monitor = CollapseMonitor(patience=3)
    for rollout in range(1, 8):
        assert monitor.observe(HEALTHY | {metric: value}) == 1
        assert len(warnings_of(caplog)) == (rollout >= 3)
    (line,) = warnings_of(caplog)
    assert line.startswith(f"{metric}={value:.3g} ")
    assert remedy in line
    assert "\n" not in line


def test_a_healthy_policy_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    monitor = CollapseMonitor(patience=1)
    assert [monitor.observe(HEALTHY) for _ in range(5)] == [0] * 5
    assert warnings_of(caplog) == []


def test_a_recovery_in_between_starts_the_count_again(caplog: pytest.LogCaptureFixture) -> None:
    monitor = CollapseMonitor(patience=2)
    for entropy in (0.0, 1.0, 0.0, 1.0, 0.0):
        monitor.observe(HEALTHY | {"train/action_entropy": entropy})
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("metric", "limit"),
    [("train/action_entropy", 0.05), ("train/valid_action_rate", 0.5), ("train/zero_std_groups", 0.9)],
)
def test_the_limit_itself_is_no_breach(metric: str, limit: float) -> None:
    assert CollapseMonitor().observe(HEALTHY | {metric: limit}) == 0


def test_causes_add_up_and_nan_is_none() -> None:
    monitor = CollapseMonitor()
    assert monitor.observe({"train/action_entropy": 0.0, "train/valid_action_rate": 0.0}) == 2
    assert monitor.observe(HEALTHY | {"train/action_entropy": math.nan}) == 0
    assert monitor.observe({}) == 0


def test_a_resumed_run_neither_repeats_nor_forgets(caplog: pytest.LogCaptureFixture) -> None:
    first = CollapseMonitor(patience=3)
    first.observe(HEALTHY | {"train/action_entropy": 0.0})
    first.observe(HEALTHY | {"train/action_entropy": 0.0})
    second = CollapseMonitor(patience=3)
    second.load_state_dict(first.state_dict())
    second.observe(HEALTHY | {"train/action_entropy": 0.0})
    assert len(warnings_of(caplog)) == 1
    third = CollapseMonitor(patience=3)
    third.load_state_dict(second.state_dict())
    third.observe(HEALTHY | {"train/action_entropy": 0.0})
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_action_entropy", -0.1),
        ("min_valid_action_rate", 1.1),
        ("min_valid_action_rate", -0.1),
        ("max_zero_std_groups", 2),
        ("patience", 0),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"callbacks\.collapse\.{key}={value}"):
        CollapseMonitor(**{key: value})


class Collapsed(L.LightningModule):
    """A module whose entropy is gone from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            entropy = 1.0 if self.current_epoch == 0 else 0.0
            self.log("train/action_entropy", entropy, on_step=True, on_epoch=False, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(torch.zeros(4, 1), batch_size=1)  # type: ignore[arg-type]


def test_it_counts_epochs_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    monitor = CollapseMonitor(patience=2)
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[monitor],
    )
    trainer.fit(Collapsed())
    assert trainer.current_epoch == 4
    assert monitor.streaks["train/action_entropy"] == 3, "one an epoch, not one an optimiser step"
    assert trainer.callback_metrics["train/collapse_causes"] == 1
    assert sum("train/action_entropy" in line for line in warnings_of(caplog)) == 1
