"""A run's state between two epochs, taken and put back.

Every random draw is a function of seed, stream and epoch (`seeding.py`), so no generator has a state to keep: a run
goes on exactly from its parameters, optimiser, schedule and counters. A rollout that was in flight is collected again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.runs.checkpoint import Snapshot, Tensors, read_checkpoint
from msgrpo_lab.runs.folder import CheckpointError
from msgrpo_lab.training.data import RolloutDataModule
from msgrpo_lab.training.module import LAPModule


def capture(
    trainer: L.Trainer, module: LAPModule, *, epoch: int, origin: Mapping[str, Any], best: Tensors | None = None
) -> Snapshot:
    """The state of a run that has done `epoch` epochs. Weights are the live tensors: `detach` copies them.

    `state` holds:

        update, epoch        optimiser updates and epochs done
        batches              batches seen, which Lightning numbers some metrics by
        data, module         counters
        groups, scheduler    the optimiser's settings and the learning-rate schedule
        callbacks            their own states, by `state_key`
        …                    and what `origin` holds: configuration, choices, the tracked run

    Args:
        trainer: whose data module is a `RolloutDataModule`.
        module: what is trained.
        epoch: epochs done.
        origin: what the run is; JSON values.
        best: parameters at the best evaluation, if they are not the present ones.
    """
    optimizer = trainer.optimizers[0].state_dict()
    state = {
        **origin,
        "update": trainer.global_step,
        "epoch": epoch,
        "batches": trainer.fit_loop.epoch_loop._batches_that_stepped,
        "data": data_of(trainer).state_dict(),
        "module": module.counters(),
        "groups": optimizer["param_groups"],
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "callbacks": {_key(callback): state for callback in _callbacks(trainer) if (state := callback.state_dict())},
    }
    moments = {f"{number}.{name}": value for number, name, value in _entries(optimizer["state"])}
    return Snapshot(weights=trainable(module.policy), optimizer=moments, state=state, best=best)


def detach(snapshot: Snapshot) -> Snapshot:
    """A copy in memory that further training does not change."""

    def copied(tensors: Tensors) -> Tensors:
        return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}

    return Snapshot(
        weights=copied(snapshot.weights),
        optimizer=copied(snapshot.optimizer),
        state=copy.deepcopy(snapshot.state),
        best=snapshot.best,
    )


def restore(snapshot: Snapshot, trainer: L.Trainer, module: LAPModule) -> None:
    """Puts a run back where `capture` took it, before its first rollout (in `on_fit_start`).

    Raises:
        CheckpointError: the checkpoint is of other parameters.
    """
    state = snapshot.state
    load_trainable(module.policy, snapshot.weights)
    restore_optimizer(snapshot, trainer)
    trainer.lr_scheduler_configs[0].scheduler.load_state_dict(state["scheduler"])
    data_of(trainer).load_state_dict(state["data"])
    module.load_counters(state["module"])
    for callback in _callbacks(trainer):
        if _key(callback) in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][_key(callback)])
    _wind_on(trainer, epochs=snapshot.epoch, updates=snapshot.update, batches=int(state["batches"]))


def restore_optimizer(snapshot: Snapshot, trainer: L.Trainer) -> None:
    """Puts the optimiser's moments and settings back, learning rate included."""
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in snapshot.optimizer.items():
        number, _, name = key.partition(".")
        moments.setdefault(int(number), {})[name] = value
    groups = [{**group, "betas": tuple(group["betas"])} for group in snapshot.state["groups"]]
    try:
        trainer.optimizers[0].load_state_dict({"state": moments, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint: its optimiser does not fit this run ({error}); give another") from error


def trainable(policy: LanguagePolicy) -> Tensors:
    """The trainable parameters by name."""
    return {name: parameter.detach() for name, parameter in _trained(policy)}


@torch.no_grad()
def load_trainable(policy: LanguagePolicy, weights: Mapping[str, torch.Tensor]) -> None:
    """Copies `weights` into the trainable parameters: all of them, and nothing else.

    Raises:
        CheckpointError: names, shapes or types differ; nothing has been copied.
    """
    own = dict(_trained(policy))
    for name in sorted(own.keys() ^ weights.keys()):
        where = "the model has no such trainable parameter" if name in weights else "it is not in the checkpoint"
        raise CheckpointError(f"checkpoint: {name}: {where}; give a checkpoint of this model and its lora_rank")
    for name, parameter in own.items():
        value = weights[name]
        if value.shape != parameter.shape or value.dtype != parameter.dtype:
            has, wants = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (value, parameter))
            raise CheckpointError(f"checkpoint: {name} is {has} and the model's is {wants}; give one of this model")
    for name, parameter in own.items():
        parameter.copy_(weights[name])


def load_policy_weights(folder: Path, policy: LanguagePolicy, *, best: bool = False) -> dict[str, Any]:
    """Gives a policy the weights of a checkpoint: for evaluation, without a trainer.

    Args:
        folder: the checkpoint's.
        policy: built from the same configuration (`state["config"]["model"]`).
        best: take the parameters of the best evaluation so far, not the last ones.

    Returns:
        The checkpoint's state; `config` and `choices` are the run's configuration, secrets hidden.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    snapshot = read_checkpoint(folder)
    weights = snapshot.best if best and snapshot.best is not None else snapshot.weights
    load_trainable(policy, weights)
    return snapshot.state


def data_of(trainer: L.Trainer) -> RolloutDataModule:
    """The trainer's data module."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, RolloutDataModule):
        raise RuntimeError("checkpoints need the rollout data module: call trainer.fit(module, datamodule=…)")
    return data


def _trained(policy: LanguagePolicy) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad)


def _entries(states: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[int, str, torch.Tensor]]:
    for number, values in states.items():
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"checkpoint: the optimiser keeps {name} as {type(value).__name__}, not as a tensor")
            yield number, name, value


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _key(callback: L.Callback) -> str:
    return callback.state_key


def _wind_on(trainer: L.Trainer, *, epochs: int, updates: int, batches: int) -> None:
    """Sets Lightning's counters as they stand between two epochs.

    They are set by hand because Lightning's own restart must guess from its counters at which point of an epoch a
    checkpoint was taken. Ours are always taken between two.
    """
    fit: Any = trainer.fit_loop
    inner = fit.epoch_loop
    for tracker in (fit.epoch_progress.total, fit.epoch_progress.current):
        tracker.ready = tracker.started = tracker.processed = tracker.completed = epochs
    steps = inner.manual_optimization.optim_step_progress.total
    steps.ready = steps.completed = updates
    seen = inner.batch_progress.total
    seen.ready = seen.started = seen.processed = seen.completed = batches
    inner._batches_that_stepped = batches
    # Or the first rollout would be collected twice: once when the loop sets up its data, once when the epoch begins.
    fit._resuming_from_checkpoint = True
