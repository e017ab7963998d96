"""The progress callback on a terminal, off it, and inside a real Lightning loop."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader, IterableDataset

from msgrpo_lab.callbacks.progress import RichTwoBars, summary

LOGGER = "msgrpo_lab.callbacks.progress"


class Rollouts(L.LightningDataModule):
    """Plays three turns an epoch for its observers, then hands out two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.observers: list[Any] = []

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        data = self

        class Epoch(IterableDataset[torch.Tensor]):
            def __iter__(self) -> Iterator[torch.Tensor]:
                for turn in range(3):
                    for observer in data.observers:
                        observer.on_turn(turn, 3, 7 - turn)
                yield torch.zeros(1)
                yield torch.zeros(1)

        return DataLoader(Epoch(), batch_size=None, num_workers=0)


class Learner(L.LightningModule):
    """Logs what the real module logs."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail = fail

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if self.fail:
            raise RuntimeError("broken on purpose")
        if batch_idx == 0:
            metrics = {"train/return_mean": 0.25, "train/success_rate": 0.5, "perf/env_steps_per_s": 1234.0}
            self.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callback: L.Callback, *, epochs: int = 3, fail: bool = False) -> Rollouts:
    data = Rollouts()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[callback],
    )
    trainer.fit(Learner(fail), datamodule=data)
    return data


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None)


def written(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def test_bars_are_drawn_on_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    terminal = console(True)
    with caplog.at_level(logging.INFO, LOGGER):
        fit(RichTwoBars(console=terminal))
    last = written(terminal)
    assert "3/3" in last
    assert "return 0.250  success 0.500  env steps/s 1234" in last
    assert "rollout" in last
    assert not [record for record in caplog.records if record.name == LOGGER], "no lines beside the bars"


def test_off_a_terminal_there_is_one_plain_line_an_update(caplog: pytest.LogCaptureFixture) -> None:
    pipe = console(False)
    with caplog.at_level(logging.INFO, LOGGER):
        fit(RichTwoBars(console=pipe))
    assert written(pipe) == ""
    messages = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert messages == [f"update {n}/3  return 0.250  success 0.500  env steps/s 1234" for n in (1, 2, 3)]


@pytest.mark.parametrize(("every_n", "updates"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (9, [5])])
def test_lines_come_every_n_updates_and_after_the_last(
    caplog: pytest.LogCaptureFixture, every_n: int, updates: list[int]
) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        fit(RichTwoBars(every_n=every_n, console=console(False)), epochs=5)
    lines = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert [int(line.split()[1].partition("/")[0]) for line in lines] == updates


def test_the_callback_listens_to_the_rollout_only_while_fitting() -> None:
    heard: list[tuple[int, int, int]] = []

    class Listening(RichTwoBars):
        def on_turn(self, turn: int, horizon: int, live: int) -> None:
            heard.append((turn, horizon, live))

    data = fit(Listening(console=console(False)), epochs=2)
    assert heard == [(0, 3, 7), (1, 3, 6), (2, 3, 5)] * 2
    assert data.observers == []


def test_the_rollout_bar_follows_the_turns() -> None:
    seen: list[tuple[float, float | None, str]] = []

    class Peeking(RichTwoBars):
        def on_turn(self, turn: int, horizon: int, live: int) -> None:
            super().on_turn(turn, horizon, live)
            assert self._progress is not None
            task = self._progress.tasks[1]
            seen.append((task.completed, task.total, task.fields["note"]))

    fit(Peeking(console=console(True)), epochs=1)
    assert seen == [(0, 3, "7 episodes live"), (1, 3, "6 episodes live"), (2, 3, "5 episodes live")]


def test_an_error_gives_the_terminal_back() -> None:
    callback = RichTwoBars(console=console(True))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        fit(callback, fail=True)
    assert callback._progress is None


@pytest.mark.parametrize("every_n", [0, -1])
def test_every_n_must_be_positive(every_n: int) -> None:
    with pytest.raises(ValueError, match=rf"callbacks.progress.every_n={every_n}: "):
        RichTwoBars(every_n=every_n)


def test_metrics_that_are_not_there_yet_are_left_out() -> None:
    assert summary({}) == ""
    assert summary({"train/success_rate": torch.tensor(0.5)}) == "success 0.500"
