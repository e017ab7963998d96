"""A run that goes on from a checkpoint equals one that was never stopped, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lab_made import Memory, composed, fit, small_lab

from msgrpo_lab.callbacks.checkpoints import AdapterKeeper, CheckpointKeeper, Resumption
from msgrpo_lab.callbacks.evaluation import HeldOutEvaluation
from msgrpo_lab.callbacks.fit import going_on_from
from msgrpo_lab.callbacks.watchdogs import Watchdogs
from msgrpo_lab.runs.checkpoint import FOLDER, Snapshot, checkpoints, newest, read_checkpoint
from msgrpo_lab.runs.folder import CheckpointError
from msgrpo_lab.training.assemble import Lab
from msgrpo_lab.training.state import load_policy_weights, trainable

EPOCHS = 4
SMALLEST = ("rollout.num_groups=2", "rollout.group_size=2", "sampler.num_episodes=4", "env.horizon=3")


class Stop(L.Callback):
    """Raises in the middle of an epoch, as a signal would."""

    def __init__(self, epoch: int, error: type[BaseException] = KeyError) -> None:
        self.epoch, self.error = epoch, error

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise self.error


class Run:
    """One process's part of a run of `EPOCHS` epochs with two optimiser steps each."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        snapshot: Snapshot | None = None,
        stop: L.Callback | None = None,
        every: int = 1,
        keep_last: int = 2,
    ) -> None:
        self.lab: Lab = small_lab(
            *SMALLEST, "update.minibatches=2", "optim.lr=0.01", f"trainer.max_epochs={EPOCHS}", *overrides
        )
        self.evaluation = HeldOutEvaluation(episodes=2, every=1, reference_simulations=2, scenario="lake")
        self.adapter = AdapterKeeper(folder=folder, evaluation=self.evaluation)
        self.watchdogs = Watchdogs(min_action_entropy=9.0, patience=2)
        self.keeper = CheckpointKeeper(
            folder=folder, origin={"config": {}}, adapter=self.adapter, every=every, keep_last=keep_last
        )
        first = [] if snapshot is None else [Resumption(snapshot=snapshot, adapter=self.adapter)]
        last = [] if stop is None else [stop]
        self.callbacks = [*first, self.evaluation, self.watchdogs, self.adapter, self.keeper, *last]
        self.folder = folder

    def fit(self) -> Memory:
        return fit(self.lab, epochs=EPOCHS, callbacks=self.callbacks, folder=self.folder)


def timeless(memory: Memory) -> dict[tuple[str, int], float]:
    return {
        (name, step): value
        for step, metrics in memory.rows
        for name, value in metrics.items()
        if not name.startswith("perf/") and name not in ("train/wall_s", "epoch")
    }


@pytest.mark.parametrize(("env", "lora"), [("frozenlake", None), ("snake", 4)])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, env: str, lora: int | None) -> None:
    choices = (f"env={env}", f"model.lora_rank={lora or 'null'}")
    whole = Run(tmp_path / "whole", *choices)
    expected = timeless(whole.fit())
    metrics: dict[tuple[str, int], float] = {}
    snapshot = None
    for stop in (Stop(0), Stop(2), None):
        part = Run(tmp_path / "parts", *choices, snapshot=snapshot, stop=stop)
        memory = Memory()
        try:
            memory = part.fit()
        except KeyError:
            memory = part.lab.module.trainer.loggers[0]  # type: ignore[assignment]
        for point, value in timeless(memory).items():
            assert metrics.setdefault(point, value) == value, f"{point} was logged twice with different values"
        found = newest(tmp_path / "parts" / FOLDER)
        assert found is not None
        snapshot = found[1]
    assert metrics == expected
    for name, value in trainable(whole.lab.policy).items():
        assert torch.equal(value, trainable(part.lab.policy)[name]), name
    assert (part.adapter.best_score, part.adapter.best_update) == (whole.adapter.best_score, whole.adapter.best_update)
    assert all(torch.equal(part.adapter.best[name], value) for name, value in whole.adapter.best.items())
    assert part.watchdogs.state_dict() == whole.watchdogs.state_dict()
    ours, theirs = (read_checkpoint(tmp_path / name / FOLDER / "update-00000008") for name in ("whole", "parts"))
    assert all(torch.equal(ours.optimizer[name], theirs.optimizer[name]) for name in ours.optimizer)
    assert ours.state["scheduler"] == theirs.state["scheduler"]
    assert ours.state["data"] == theirs.state["data"]


def test_which_checkpoints_there_are(tmp_path: Path) -> None:
    run = Run(tmp_path, every=3, keep_last=9)
    run.fit()
    assert [update for update, _ in checkpoints(tmp_path / FOLDER)] == [0, 6, 8], "update 0, epoch 3, the last epoch"


def test_an_interrupted_run_keeps_its_last_whole_epoch(tmp_path: Path) -> None:
    """Although no checkpoint was due."""
    run = Run(tmp_path, every=100, stop=Stop(2, SystemExit))
    with pytest.raises(SystemExit):
        run.fit()
    found = newest(tmp_path / FOLDER)
    assert found is not None
    assert (found[1].update, found[1].epoch) == (4, 2)
    whole = Run(tmp_path / "whole")
    whole.fit()
    resumed = Run(tmp_path, snapshot=found[1])
    resumed.fit()
    assert all(torch.equal(v, trainable(resumed.lab.policy)[n]) for n, v in trainable(whole.lab.policy).items())


def test_the_weights_of_a_checkpoint_play_without_a_trainer(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.fit()
    fresh = small_lab()
    state = load_policy_weights(tmp_path / FOLDER / "update-00000008", fresh.policy)
    assert all(torch.equal(v, trainable(fresh.policy)[n]) for n, v in trainable(run.lab.policy).items())
    assert state["update"] == 8
    load_policy_weights(tmp_path / FOLDER / "update-00000008", fresh.policy, best=True)
    assert all(torch.equal(v, trainable(fresh.policy)[n]) for n, v in run.adapter.best.items())
    other = small_lab("model.lora_rank=4")
    with pytest.raises(CheckpointError, match="lora_rank"):
        load_policy_weights(tmp_path / FOLDER / "update-00000008", other.policy)
    wider = small_lab("model.source.intermediate_size=32")
    with pytest.raises(CheckpointError, match=r"\(64, 32\) float32 and the model's is \(32, 32\)"):
        load_policy_weights(tmp_path / FOLDER / "update-00000008", wider.policy)


class Broken(L.Callback):
    """Rolls back at the start of an epoch's second batch."""

    def __init__(self, epochs: set[int]) -> None:
        self.epochs = epochs
        self.keeper: CheckpointKeeper | None = None
        self.went_back_to: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch in self.epochs and batch_idx == 0:
            assert self.keeper is not None
            self.went_back_to.append(self.keeper.roll_back(trainer, pl_module, 0.5))


def test_a_roll_back_goes_on_with_older_weights_and_a_lower_rate_and_survives_a_kill(tmp_path: Path) -> None:
    plain = timeless(Run(tmp_path / "plain").fit())
    broken = Broken({1, 3})
    whole = Run(tmp_path / "whole", stop=broken)
    broken.keeper = whole.keeper
    expected = timeless(whole.fit())
    assert broken.went_back_to == [2, 6]
    rate = {step: expected["train/lr", step] / plain["train/lr", step] for step in range(8)}
    assert [round(rate[step], 12) for step in range(8)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]
    assert expected["train/loss", 2] == plain["train/loss", 2]
    assert expected["train/loss", 4] != plain["train/loss", 4]
    snapshot = None
    for epoch in (1, 2):
        again = Broken({1, 3})
        part = Run(tmp_path / "parts", snapshot=snapshot, stop=again)
        again.keeper = part.keeper
        part.callbacks.append(Stop(epoch + 1, KeyError))
        with pytest.raises(KeyError):
            part.fit()
        found = newest(tmp_path / "parts" / FOLDER)
        assert found is not None
        snapshot = found[1]
    again = Broken({1, 3})
    last = Run(tmp_path / "parts", snapshot=snapshot, stop=again)
    again.keeper = last.keeper
    last.fit()
    assert all(torch.equal(v, trainable(last.lab.policy)[n]) for n, v in trainable(whole.lab.policy).items())


def test_there_must_be_something_to_roll_back_to(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.keeper.parent = tmp_path / "elsewhere"
    with pytest.raises(CheckpointError, match="no checkpoint to roll back to"):
        run.keeper.roll_back(None, run.lab.module, 0.5)  # type: ignore[arg-type]


def test_a_resumed_run_computes_in_its_checkpoints_number_type() -> None:
    """What `auto` measures can change from one process to the next; a run's number type may not."""
    kept = Snapshot(weights={}, optimizer={}, state={"precision": "bfloat16"})
    automatic, explicit = composed(), composed("model.precision=float32")
    assert going_on_from(kept, automatic).model.precision == "bfloat16"
    assert automatic.model.precision == "auto", "the run's own configuration stays as it was written"
    assert going_on_from(kept, explicit).model.precision == "float32"
    assert going_on_from(None, automatic) is automatic
    begun = composed("model.adapter=somewhere", "resume=auto")
    assert going_on_from(kept, begun).model.adapter is None, "the checkpoint's weights take its place"
